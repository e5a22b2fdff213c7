"""data/texts.py against brute force: which modules, which windows, how many bytes, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import builtin_tokenizer
from transformers import PreTrainedTokenizerFast

from sparsessm.data import texts as data

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOKENIZER = builtin_tokenizer()

LINES = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(60))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "code.txt"
    path.write_text(LINES, encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def token_bytes(number: int) -> bytes:
    """The bytes of one token, from the byte-level alphabet itself (GPT-2's printable stand-ins)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in plain}
    alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}
    token = TOKENIZER.convert_ids_to_tokens(number)
    return b"" if number == TOKENIZER.eos_token_id else bytes(alphabet[c] for c in token)


# --- stdlib ---


def test_stdlib_sides_are_disjoint_and_complete() -> None:
    every = [name for name, _ in data.stdlib_modules(held_out=None)]
    train = [name for name, _ in data.stdlib_modules(held_out=False)]
    held_out = [name for name, _ in data.stdlib_modules(held_out=True)]
    assert every == sorted(every) and len(set(every)) == len(every)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == every
    assert 0.05 < len(held_out) / len(every) < 0.15


def test_stdlib_split_is_the_documented_hash() -> None:
    for name in ("argparse", "json.scanner", "locale", "random", "zipfile", "email"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        assert data.is_held_out(name) == (int(digest[:16], 16) % 10 == 0)
    # pinned: a changed rule would let the built-in model be measured on what it was trained on
    assert data.is_held_out("random") and data.is_held_out("json.scanner") and data.is_held_out("locale")
    assert not data.is_held_out("argparse") and not data.is_held_out("json.decoder")


def test_stdlib_leaves_out_tests_tables_and_installed_packages() -> None:
    names = {name for name, _ in data.stdlib_modules(held_out=None)}
    assert {"argparse", "json.decoder", "random"} <= names
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"} & set(
            name.split(".")
        )
    assert not any("_sysconfigdata" in name for name in names)


def test_a_module_keeps_its_name_when_it_becomes_a_package() -> None:
    assert data.module_name(("zipfile.py",)) == data.module_name(("zipfile", "__init__.py")) == "zipfile"
    assert data.module_name(("json", "scanner.py")) == "json.scanner"


def test_stdlib_documents_are_the_modules() -> None:
    texts = data.documents("stdlib", "evaluation")
    assert texts == [text for _, text in data.stdlib_modules(held_out=True) if text]
    assert any("class Random(" in text for text in texts)
    assert not set(texts) & set(data.documents("stdlib", "calibration"))


# --- windows ---


def test_calibration_windows_are_seeded_pieces_of_the_text(text_file: str) -> None:
    stream = TOKENIZER(LINES)["input_ids"]
    windows = data.calibration_windows(text_file, TOKENIZER, samples=8, length=32, seed=3)
    assert windows.shape == (8, 32) and windows.dtype == torch.int64
    pieces = {tuple(stream[i : i + 32]): i for i in range(len(stream) - 31)}
    starts = sorted(pieces[tuple(window)] for window in windows.tolist())
    assert all(b - a >= 32 for a, b in zip(starts, starts[1:], strict=False))  # enough text: no overlap
    again = data.calibration_windows(text_file, TOKENIZER, samples=8, length=32, seed=3)
    other = data.calibration_windows(text_file, TOKENIZER, samples=8, length=32, seed=4)
    assert torch.equal(windows, again) and not torch.equal(windows, other)


@given(
    samples=st.integers(1, 12),
    length=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    cut=st.integers(60, 400),
)
@settings(max_examples=40, deadline=None)
def test_any_calibration_window_is_a_piece(
    tmp_path_factory: pytest.TempPathFactory, samples: int, length: int, seed: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(LINES[:cut], encoding="utf-8")
    stream = TOKENIZER(LINES[:cut])["input_ids"]
    if len(stream) < length:
        with pytest.raises(ValueError, match=rf"{len(stream)} tokens.*window of {length}"):
            data.calibration_windows(str(path), TOKENIZER, samples=samples, length=length, seed=seed)
        return
    windows = data.calibration_windows(str(path), TOKENIZER, samples=samples, length=length, seed=seed)
    pieces = {tuple(stream[i : i + length]) for i in range(len(stream) - length + 1)}
    assert windows.shape == (samples, length)
    assert all(tuple(window) in pieces for window in windows.tolist())


def test_documents_are_packed_with_an_end_of_text_between(tmp_path: Path) -> None:
    texts = ["import os\n", "x = 1\n", "print('héllo', x)\n"]
    path = write_jsonl(tmp_path / "d.jsonl", texts)
    end = TOKENIZER.eos_token_id
    stream = []
    for text in texts:
        stream += ([end] if stream else []) + TOKENIZER(text)["input_ids"]
    windows, n_bytes = data.evaluation_windows(path, TOKENIZER, length=4)
    count = len(stream) // 4
    assert windows.flatten().tolist() == stream[: 4 * count] and end in stream[: 4 * count]
    assert n_bytes == sum(len(token_bytes(i)) for window in windows.tolist() for i in window[1:])


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80), length=st.integers(2, 9))
@settings(max_examples=150, deadline=None)
def test_bytes_of_the_predicted_tokens(
    tmp_path_factory: pytest.TempPathFactory, text: str, length: int
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("text") / "t.jsonl", [text])
    stream = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(stream) == text  # the built-in tokenizer loses nothing
    if len(stream) < length:
        with pytest.raises(ValueError, match="fewer than a window"):
            data.evaluation_windows(path, TOKENIZER, length=length)
        return
    windows, n_bytes = data.evaluation_windows(path, TOKENIZER, length=length)
    exact = sum(len(token_bytes(i)) for window in windows.tolist() for i in window[1:])
    # a character of up to four bytes, split at the start or end of a window, counts with its first token
    assert abs(n_bytes - exact) <= 6 * len(windows)
    if text.isascii():
        assert n_bytes == exact


def test_whole_text_in_one_window_has_all_bytes_but_the_first_token(text_file: str) -> None:
    stream = TOKENIZER(LINES)["input_ids"]
    windows, n_bytes = data.evaluation_windows(text_file, TOKENIZER, length=len(stream))
    assert windows.shape == (1, len(stream))
    assert n_bytes == len(LINES.encode()) - len(token_bytes(stream[0]))


def test_evaluation_limit_takes_windows_evenly_over_the_text(text_file: str) -> None:
    windows, n_bytes = data.evaluation_windows(text_file, TOKENIZER, length=16)
    last = len(windows) - 1
    some, fewer = data.evaluation_windows(text_file, TOKENIZER, length=16, limit=3)
    assert torch.equal(some, windows[[0, round(last / 2), last]])
    assert fewer == sum(len(token_bytes(i)) for window in some.tolist() for i in window[1:]) < n_bytes
    assert torch.equal(data.evaluation_windows(text_file, TOKENIZER, length=16, limit=1)[0], windows[:1])
    assert torch.equal(data.evaluation_windows(text_file, TOKENIZER, length=16, limit=10**6)[0], windows)


def test_a_slow_tokenizer_gets_the_proportional_bytes(text_file: str) -> None:
    class Letters:
        """One token a character, without offsets."""

        is_fast = False
        eos_token_id = None

        def __call__(self, text: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(c) for c in one] for one in text]}

    windows, n_bytes = data.evaluation_windows(text_file, Letters(), length=10)
    assert n_bytes == 9 * len(windows)


def test_fingerprint_is_the_hash_of_little_endian_int64() -> None:
    expected = hashlib.sha256(struct.pack("<4q", 1, 2, 3, 70000)).hexdigest()
    assert data.fingerprint(torch.tensor([[1, 2], [3, 70000]])) == expected
    assert data.fingerprint(torch.tensor([[1, 3], [2, 70000]]).t()) == expected  # rows, not memory order


# --- files and refusals ---


def test_txt_and_jsonl_documents(tmp_path: Path, text_file: str) -> None:
    assert data.documents(text_file, "calibration") == data.documents(text_file, "evaluation") == [LINES]
    separator = "one line separator \u2028 inside"  # ends no line of a .jsonl file
    path = tmp_path / "d.jsonl"
    path.write_text(
        json.dumps({"text": separator}, ensure_ascii=False) + '\n\n{"text": "b"}', encoding="utf-8"
    )
    assert data.documents(str(path), "evaluation") == [separator, "b"]


def test_parquet_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"needs pyarrow; install sparsessm\[data\]"):
            data.documents(str(path), "evaluation")
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), path)
    assert data.documents(str(path), "evaluation") == ["a", "b"]
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(ValueError, match="column 'text'"):
        data.documents(str(path), "evaluation")
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="column 'text'"):
        data.documents(str(path), "evaluation")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_a_download_without_the_extra_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # the import fails as if it were not installed
    with pytest.raises(ValueError, match=rf"'{name}' needs the datasets package; install sparsessm\[data\]"):
        data.documents(name, "evaluation")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "wikitxt2",
            r"unknown data 'wikitxt2'; known: stdlib, wikitext2, c4, ptb, or a file.*mean 'wikitext2'",
        ),
        ("zzz", r"unknown data 'zzz'; known: .* or a directory of such files$"),
        ("absent.txt", "no such file"),
    ],
)
def test_unknown_data(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.documents(given, "evaluation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("d.jsonl", b'{"body": "a"}\n', "line 1: needs an object with a string field 'text'"),
        ("d.jsonl", b'["a"]\n', "line 1: needs an object"),
        ("d.jsonl", b'{"text": 3}\n', "line 1: needs an object"),
        ("d.txt", b"\xff\xfe\x00", "not UTF-16 text"),
        ("d.txt", b"", "no text in the evaluation split"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.documents(str(tmp_path / name), "evaluation")


def test_unknown_split_and_impossible_sizes(text_file: str) -> None:
    with pytest.raises(ValueError, match="unknown split 'train'"):
        data.documents(text_file, "train")  # type: ignore[arg-type]
    for samples, length in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"samples={samples}, length={length}"):
            data.calibration_windows(text_file, TOKENIZER, samples=samples, length=length, seed=0)
    with pytest.raises(ValueError, match="length >= 2"):
        data.evaluation_windows(text_file, TOKENIZER, length=1)
    with pytest.raises(ValueError, match="limit >= 1"):
        data.evaluation_windows(text_file, TOKENIZER, length=4, limit=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real corpora beside this project")
def test_real_corpora() -> None:
    neox = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / "gpt-neox-20b" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    path = str(SHARED / "c4_sample.jsonl")
    texts = data.documents(path, "evaluation")
    assert len(texts) == 1000
    windows, n_bytes = data.evaluation_windows(path, neox, length=2048)
    share = windows[:, 1:].numel() / sum(len(ids) + 1 for ids in neox(texts, verbose=False)["input_ids"])
    assert n_bytes == pytest.approx(share * sum(len(text.encode()) for text in texts), rel=2e-3)
    wiki, wiki_bytes = data.evaluation_windows(str(SHARED / "wikitext2.test.raw.txt"), neox, length=2048)
    assert wiki_bytes == pytest.approx(1290590 * 2047 / 2048, rel=2e-2)
    assert data.fingerprint(wiki) != data.fingerprint(windows)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    """Valid JSON that is no text."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud800 not"}\n')
    with pytest.raises(ValueError, match="line 2: not a Unicode text"):
        data.documents(str(path), "calibration")
