"""Local texts: what Windows, gzip and people's folders make of them, and one line for what is no text."""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import builtin_tokenizer

from sparsessm.data import text_files
from sparsessm.data import texts as data
from sparsessm.recipe.recipe import Recipe

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), min_size=1)
ENCODERS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16 little": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-32": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
}


def written(path: Path, text: str, encoding: str = "UTF-8", line_end: str = "\n") -> str:
    content = ENCODERS[encoding](text.replace("\n", line_end))
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS,
    encoding=st.sampled_from(list(ENCODERS)),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    name=st.sampled_from(["a.txt", "a.TXT", "a.Txt", "a.txt.gz", "A.TXT.GZ"]),
)
def test_a_text_is_the_same_however_it_was_written(
    folder: Path, text: str, encoding: str, line_end: str, name: str
) -> None:
    assert data.documents(written(folder / name, text, encoding, line_end), "calibration") == [text]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    encoding=st.sampled_from(list(ENCODERS)),
    line_end=st.sampled_from(["\n", "\r\n"]),
    name=st.sampled_from(["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json", "a.Json.Gz", "list.json"]),
    column=st.sampled_from([None, "body", "text"]),
)
def test_records_are_the_same_however_they_were_written(
    folder: Path, texts: list[str], encoding: str, line_end: str, name: str, column: str | None
) -> None:
    rows = [{"id": number, column or "text": text} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = json.dumps(rows, indent=1) if name == "list.json" else lines
    path = written(folder / name, content, encoding, line_end)
    assert data.documents(path, "evaluation", column) == texts


def test_a_windows_text_gives_the_tokens_of_the_same_text(folder: Path) -> None:
    text = "def größe(x):\n    return x + 1\n" * 20
    windows = [
        data.evaluation_windows(written(folder / "w.txt", text, *how), builtin_tokenizer(), length=16)
        for how in (("UTF-8", "\n"), ("UTF-8 with a mark", "\r\n"), ("UTF-16 little", "\r\n"))
    ]
    assert all(tokens.equal(windows[0][0]) and size == windows[0][1] for tokens, size in windows)


def test_an_unmarked_line_end_inside_a_json_string_stays(folder: Path) -> None:
    path = folder / "inside.jsonl"
    path.write_bytes(b'{"text": "a\\r\\nb"}\r\n')
    assert data.documents(str(path), "evaluation") == ["a\r\nb"]


def test_items_of_a_list_may_be_the_texts_themselves(folder: Path) -> None:
    assert data.documents(written(folder / "s.json", '["a", "b"]'), "evaluation") == ["a", "b"]
    with pytest.raises(ValueError, match="item 1: needs an object with a string field 'body', got str"):
        data.documents(written(folder / "s.json", '["a", "b"]'), "evaluation", "body")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.sets(
        st.lists(st.sampled_from(["a", "b", "B", ".hidden", "c d", "é"]), min_size=1, max_size=3).map(tuple),
        max_size=6,
    ),
    endings=st.lists(
        st.sampled_from([".txt", ".JSONL", ".txt.gz", ".md", ".gz", ""]), min_size=6, max_size=6
    ),
)
def test_a_directory_is_its_files_in_the_order_of_their_names(
    tmp_path_factory: pytest.TempPathFactory, names: set[tuple[str, ...]], endings: list[str]
) -> None:
    root = tmp_path_factory.mktemp("many")
    expected = {}
    for names_of_it, ending in zip(sorted(names), endings, strict=False):
        parts = (*(f"{part}d" for part in names_of_it[:-1]),)  # no folder has the name of a file
        path = root.joinpath(*parts, names_of_it[-1] + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"text of {path}"
        written(path, json.dumps({"text": text}) if ending == ".JSONL" else text)
        hidden = any(part.startswith(".") for part in names_of_it)
        if ending in (".txt", ".JSONL", ".txt.gz") and not hidden:
            expected[path.relative_to(root).parts] = text
    if expected:
        assert data.documents(str(root), "calibration") == [expected[parts] for parts in sorted(expected)]
    else:
        with pytest.raises(ValueError, match="it contains no file of a known type; known: .txt, .jsonl"):
            data.documents(str(root), "calibration")


def test_links_between_directories_end(tmp_path: Path) -> None:
    (tmp_path / "root/in").mkdir(parents=True)
    (tmp_path / "aside").mkdir()
    written(tmp_path / "root/in/a.txt", "a")
    written(tmp_path / "aside/b.txt", "b")
    (tmp_path / "root/in/loop").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root/linked").symlink_to(tmp_path / "aside", target_is_directory=True)
    assert data.documents(str(tmp_path / "root"), "calibration") == ["a", "b"]


def test_a_column_in_a_directory_is_for_the_files_that_have_columns(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "plain")
    with pytest.raises(ValueError, match="column 'body' has no effect: all its files are .txt"):
        data.documents(str(tmp_path), "calibration", "body")
    written(tmp_path / "b.jsonl", '{"body": "of a column"}')
    assert data.documents(str(tmp_path), "calibration", "body") == ["plain", "of a column"]
    with pytest.raises(ValueError, match="'b.jsonl': line 1: .*field 'text'; there: body"):
        data.documents(str(tmp_path), "calibration")


def test_a_wrong_column_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({"title": "t", "body": "b"}))
    with pytest.raises(ValueError, match=r"line 1: .*'bodi'; there: title, body \(choose with column="):
        data.documents(path, "calibration", "bodi")
    if importlib.util.find_spec("pyarrow") is None:
        return
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "a.Parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["t"], "body": ["b"]}), table)
    assert data.documents(str(table), "calibration", "body") == ["b"]
    with pytest.raises(ValueError, match="no column 'text'; there: title, body"):
        data.documents(str(table), "calibration")


@pytest.mark.parametrize("name", ["stdlib", "a.txt", "A.TXT.gz"])
def test_a_column_where_there_is_none_is_refused(name: str) -> None:
    words = f"column is 'body'; it has no effect with data '{name}'"
    with pytest.raises(ValueError, match=words):
        data.documents(name, "calibration", "body")
    with pytest.raises(ValueError, match=words):
        Recipe(data=name, column="body")


def test_other_data_drops_the_column_of_a_recipe() -> None:
    recipe = Recipe(data="a.jsonl", column="body")
    assert recipe.model_dump()["column"] == "body"
    assert recipe.updated(data="stdlib").column is None
    assert recipe.updated(data="b.jsonl", column="text").column == "text"


def test_any_directory_is_data_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'corpus'; .* or a directory of such files"):
        Recipe(data="corpus")
    (tmp_path / "corpus").mkdir()
    assert Recipe(data="corpus").data == "corpus"
    assert Recipe(data="gone/corpus").data == "gone/corpus"  # a result is read where its text is not


TRUNCATED = gzip.compress(b"text " * 1000, mtime=0)[:-12]
DAMAGED = bytearray(gzip.compress(random.Random(0).randbytes(400), mtime=0))
DAMAGED[60:90] = bytes(30)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt.gz", TRUNCATED, "truncated: the compressed file ends too early"),
        ("a.jsonl.gz", b"plain", "cannot be read .Not a gzipped file"),
        ("a.txt.gz", bytes(DAMAGED), "damaged|cannot be read"),
        ("a.txt", b"text\0with a zero", "not a text file .a zero byte, at character 4"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8 text .byte 0"),
        ("a.txt", codecs.BOM_UTF16_LE + b"\x00\xd8", "not UTF-16 text"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON .nested too deeply"),
        ("a.json", b"[" * 100_000, "not JSON .nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 6000 + b"}", "line 1: not JSON .a whole number of 6000 digits"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: not a Unicode text"),
        ("a.json", b'{\n  "text": "a"\n}', "line 1: not JSON"),
    ],
)
def test_what_is_no_text_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    for given_path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=words) as caught:
            data.documents(str(given_path), "calibration")
        told = str(caught.value)
        assert told.startswith(f"data '{given_path}': ") and name in told and "\n" not in told
        assert len(told) < 400


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "broken.txt").symlink_to("absent")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, words in (
        ("loop.txt", "a link that leads nowhere"),
        ("broken.txt", "a link that leads nowhere"),
        ("pipe.txt", "not a regular file"),
        ("absent.jsonl", "no such file"),
        ("absent", "no such directory, and not a .txt/.jsonl/.json/.parquet file"),
        ("zero\0.txt", "no such file"),
        ("\udcff.txt", "its name is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=words):
            data.documents(str(tmp_path / name), "calibration")
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match="not of a known type"):
        data.documents(str(tmp_path / "a.pdf"), "calibration")
    for name in ("loop.txt", "broken.txt"):
        (tmp_path / name).rename(tmp_path / f"{name}.aside")
    with pytest.raises(ValueError, match="'pipe.txt': not a regular file"):
        data.documents(str(tmp_path), "calibration")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_right_to_read_is_named(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a.txt", "a"))
    path.chmod(0)
    for given_path in (path, tmp_path):
        with pytest.raises(ValueError, match="a.txt.*cannot be read .Permission denied"):
            data.documents(str(given_path), "calibration")


def test_what_unpacks_without_end_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_UNPACKED", 3 << 20)
    fits, bomb = written(tmp_path / "fits.txt.gz", "a" * (3 << 20)), tmp_path / "bomb.txt.gz"
    bomb.write_bytes(gzip.compress(bytes(64 << 20)))
    assert len(data.documents(fits, "calibration")[0]) == 3 << 20
    with pytest.raises(ValueError, match="more than 3,145,728 bytes when unpacked; take a part of it"):
        data.documents(str(bomb), "calibration")


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    ).map(lambda value: json.dumps(value).encode()),
    name=st.sampled_from(["x.txt", "x.jsonl", "x.json", "x.parquet", "x.txt.gz", "x.jsonl.gz"]),
    wrapped=st.booleans(),
)
def test_any_bytes_are_texts_or_one_line(folder: Path, content: bytes, name: str, wrapped: bool) -> None:
    (folder / name).write_bytes(gzip.compress(content) if wrapped else content)
    try:
        texts = data.documents(str(folder / name), "evaluation")
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(f"data '{folder / name}'")
    else:
        assert texts and all(isinstance(text, str) and text.encode() for text in texts)
