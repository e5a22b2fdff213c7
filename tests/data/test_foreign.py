"""Text of strangers: JSON and YAML of any bytes are plain values of a bounded depth, or one clear line."""

from __future__ import annotations

import codecs
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_tokenizer

import sparsessm
from sparsessm import checkpoint
from sparsessm.checkpoint.files import parse_json, read_json
from sparsessm.data.foreign import MOST_DEPTH, decoded, from_json, from_yaml
from sparsessm.recipe.recipe import Recipe

CHARACTERS = st.characters(codec="utf-8")
TEXTS = st.text(CHARACTERS, max_size=9)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=9,
)
BRACKETS = {"lists": ("[", "]"), "objects": ('{"a": ', "}"), "both": ('[{"a": ', "}]")}


def depth_of(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth_of, parts), default=0)


def one_line(error: ValueError) -> str:
    told = str(error)
    assert "\n" not in told and len(told) < 500, told
    return told


@settings(max_examples=50, deadline=None)
@given(value=VALUES, ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_is_read_as_the_library_does(value: Any, ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    for given_text in (text, text.encode(), codecs.BOM_UTF8 + text.encode(), text.encode("utf-16")):
        assert from_json(given_text) == value
    assert from_json(text, strict=True) == value


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_bytes_are_json_or_one_line(content: bytes) -> None:
    for strict in (False, True):
        try:
            value = from_json(content, strict=strict)
        except ValueError as error:
            one_line(error)
        else:
            json.dumps(value, ensure_ascii=False).encode()  # text that can be written


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text(st.sampled_from("&*a[]{}:,- \n?!|>'\"<"), max_size=40))
def test_any_text_is_yaml_or_one_line(text: str) -> None:
    try:
        value = from_yaml(text)
    except ValueError as error:
        one_line(error)
    else:
        assert depth_of(value) <= MOST_DEPTH + 2
        try:
            expected = yaml.load(text, yaml.BaseLoader)
        except yaml.YAMLError:  # of a tag that it has no constructor for
            return
        assert value == expected


@settings(max_examples=25, deadline=None)
@given(value=st.dictionaries(st.text(CHARACTERS, max_size=9), VALUES, min_size=1, max_size=3))
def test_yaml_gives_every_scalar_as_it_was_written(value: dict[str, Any]) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert from_yaml(text) == yaml.load(text, yaml.BaseLoader)


@pytest.mark.parametrize("kind", BRACKETS)
@pytest.mark.parametrize("depth", [MOST_DEPTH + 1, 900, 100_000])
def test_deep_nesting_is_refused_whatever_the_stack(kind: str, depth: int) -> None:
    begin, end = BRACKETS[kind]
    text = begin * depth + "1" + end * depth
    with pytest.raises(ValueError, match="nested too deeply; allowed: 64"):
        from_json(text)
    if depth < 1000 or kind == "lists":
        with pytest.raises(ValueError, match="nested too deeply"):
            from_yaml(text)
    for cut in (text[: len(begin) * depth], text[:-1]):
        with pytest.raises(ValueError):
            from_json(cut)


def test_as_deep_as_people_write_is_read() -> None:
    text = "[" * 60 + "]" * 60
    assert depth_of(from_json(text)) == depth_of(from_yaml(text)) == 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "line 1: nested too deeply"),
        ("a: &a {b: *a}", "line 1: nested too deeply"),
        ("&a [1, *a]", "nested too deeply"),
        ("a: *nowhere", "not readable as YAML .found undefined alias"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' appears twice"),
        ("rules:\n- targets: x\n  sparsity: 0.1\n  targets: y", "line 4: 'targets' appears twice"),
        ('{"a": 1,\n"b": {"c": 1, "c": 2}}', "line 2: 'c' appears twice"),
        ("? [1, 2]\n: 3", "line 1: the name of a field is not a text"),
        ("a: [1, 2", "not readable as YAML"),
        ("a: \x07", "not readable as YAML"),
        ("--- 1\n--- 2", "not readable as YAML"),
        ("x" * (1 << 20) + "y", "more than 1,048,576 characters"),
    ],
)
def test_yaml_that_is_wrong_is_named_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_yaml(text)
    one_line(caught.value)


def test_aliases_work_until_they_multiply() -> None:
    assert from_yaml("a: &x [1, 2]\nb: *x") == {"a": ["1", "2"], "b": ["1", "2"]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ValueError, match="more than 100,000 values after its aliases are expanded"):
        from_yaml("\n".join(lines))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9" * 5000, "a whole number of 5000 digits; allowed: 300"),
        ("-" + "9" * 301, "a whole number of 302 digits"),
        ('"\\ud800"', "not a Unicode text: an unpaired surrogate"),
        ('{"\\udfff": 1}', "not a Unicode text: an unpaired surrogate"),
        ('[1, ["\\uDBFF x"]]', "not a Unicode text: an unpaired surrogate"),
        (b"\xff", "not UTF-8 text .byte 0"),
        (b"\xfe\xff\xd8\x00", "not UTF-16 text"),
        ("", "Expecting value"),
    ],
)
def test_json_that_nothing_could_hold_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_json(text)
    one_line(caught.value)


def test_the_digits_of_a_number_are_bounded_whatever_python_is_told() -> None:
    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(ValueError, match="a whole number of 100000 digits"):
            from_json("9" * 100_000)
    finally:
        sys.set_int_max_str_digits(most)


def test_our_own_formats_are_read_strictly() -> None:
    assert from_json('{"a": 1, "a": 2}') == {"a": 2}
    assert math.isnan(from_json("[NaN]")[0])
    for text, words in (('{"a": 1, "a": 2}', "'a' appears twice"), ("[NaN]", "NaN is not a JSON number")):
        with pytest.raises(ValueError, match=words):
            from_json(text, strict=True)
    for content in (codecs.BOM_UTF8 + b"{}", "{}".encode("utf-16")):
        with pytest.raises(ValueError):
            from_json(content, strict=True)


def test_floats_that_json_does_not_have_come_as_transformers_writes_them() -> None:
    content = b'{"a": [0.0, {"__float__": "Infinity"}], "b": {"__float__": 1, "c": 2}}'
    assert parse_json(content, "x") == {"a": [0.0, float("inf")], "b": {"__float__": 1, "c": 2}}
    assert parse_json('{"a": {"__float__": "NaN"}}', "x", strict=True) == {"a": {"__float__": "NaN"}}


def test_marks_of_every_encoding() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decoded("größe".encode(encoding)) == "größe"
    assert decoded(codecs.BOM_UTF16_BE + "é".encode("utf-16-be")) == "é"


# ------------------------------------------------------------------------------------------ in files


DEEP = b'{"a": ' * 100_000
BAD = {
    "deep": (DEEP, "nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 6000 + b"}", "a whole number of 6000 digits"),
    "half": (b'{"a": "\\ud800"}', "an unpaired surrogate"),
    "bytes": (b'{"a": "\xff"}', "not UTF-8 text"),
    "list": (b"[]", "expected a JSON object, got list"),
    "nothing": (b"", "not readable as JSON"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "pruning.json"])
def test_a_bad_file_of_a_checkpoint_is_one_line_with_its_name(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "in"
    pico_mamba().save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    content, words = BAD[kind]
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.read_record(folder) if name == "pruning.json" else sparsessm.load(folder)
    assert name in one_line(caught.value)
    if name == "pruning.json":
        with pytest.raises(ValueError, match=r"recipe .*pruning\.json: ") as caught:
            Recipe.load(folder)
        one_line(caught.value)


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # no blocks behind it
    with pytest.raises(ValueError, match=r"config\.json: more than 134,217,728 bytes"):
        read_json(tmp_path / "config.json")
    (tmp_path / "recipe.yaml").symlink_to("config.json")
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml: more than [\d,]+ "):
        Recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_that_windows_wrote(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = '{"sparsity": "0.25",\r\n "target": "ssm"}\r\n'
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(text.encode(encoding))
    assert Recipe.load(path) == Recipe(sparsity=0.25, target="ssm")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.yaml", "sparsity: 0.5\nseed: 1\nsparsity: 0.6\n", "line 3: 'sparsity' appears twice"),
        ("r.json", '{"sparsity": 0.5,\n "sparsity": 0.6}', "line 2: 'sparsity' appears twice"),
        ("r.JSON", '{\t"sparsity": 0.5,\n\t"sparsity": 0.6}', "'sparsity' appears twice"),
        ("r.json", '{"recipe": {"rules": [{"targets": "a",\n"targets": "b"}]}}', "line 2: 'targets' appears"),
        ("r.yaml", "seed: " + "9" * 5000, "seed is '9999"),
        ("r.yaml", "x" * 500 + ": 1", "unknown recipe field 'xxx"),
        ("r.yaml", "ignore: &a [*a]", "nested too deeply"),
    ],
)
def test_a_bad_recipe_is_one_line_with_its_name(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        Recipe.load(tmp_path / name)
    assert one_line(caught.value).startswith(f"recipe {tmp_path / name}: ")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_marked_file_of_a_checkpoint_is_read_and_goes_out_plain(
    tmp_path: Path, name: str, encoding: str
) -> None:
    folder = tmp_path / "in"
    pico_mamba().save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    plain = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_bytes(plain.encode(encoding))
    sparsessm.save(sparsessm.load(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / name).read_text(encoding="utf-8")) == json.loads(plain)
