"""Packed files with random bytes changed, and the inputs that the fuzzer found: refused or valid."""

from __future__ import annotations

import math
import re
import struct
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from golden_files import CODED, CONV, CORPUS, GOLDEN, GOLDENS, expected, fuzz, opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsessm.checkpoint import container, described, packed_file
from sparsessm.checkpoint.encoding import Encoded


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return fuzz()


def test_the_check_of_the_fuzzer_can_fail(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (GOLDEN / "lossless" / container.PACKED).read_bytes()
    assert tool.expected() == expected()
    assert tool.one(content, expected(), tmp_path) is None
    assert "the file ends at" in tool.one(content[:-1], expected(), tmp_path)
    monkeypatch.setattr(Encoded, "check", lambda self, contents=True: None)
    for module in (container, described, packed_file):
        monkeypatch.setattr(module, "checksum", lambda parts: "0" * 8)
    header, start, _ = opened(content)
    at = start + header[CONV]["data_offsets"][0]
    changed = re.sub(rb"(checksum\W+)[0-9a-f]{8}", rb"\g<1>00000000", content)
    with pytest.raises(AssertionError):
        tool.one(changed[:at] + struct.pack("<f", math.nan) + changed[at + 4 :], expected(), tmp_path)


@pytest.mark.parametrize("name", [*GOLDENS, *CODED])
@given(st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_refused_or_valid(tool: ModuleType, name: str, data: st.DataObject) -> None:
    content = bytearray((GOLDEN / name / container.PACKED).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from([*b'0129-:,"[]{}.e']))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :][: data.draw(st.integers(0, 3))]
    with tempfile.TemporaryDirectory() as folder:
        tool.one(bytes(content), expected(), Path(folder))


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_inputs_that_the_fuzzer_found(tool: ModuleType, tmp_path: Path, file: Path) -> None:
    tool.one(file.read_bytes(), expected(), tmp_path)


def test_there_are_inputs() -> None:
    assert len(list(CORPUS.glob("*"))) > 10
