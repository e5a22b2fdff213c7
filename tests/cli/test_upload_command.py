"""`sparsessm upload`: the bytes of a result arrive at a hub on this machine, private, in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from command import FAST, refused, run
from hub import TOKEN, Hub, hub

from sparsessm.checkpoint import uploading

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and somebody who is logged in to it."""
    with hub() as held:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", held.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield held


@pytest.fixture
def result(here: Path) -> Path:
    """Of `prune`, with a page beside it."""
    run("prune", "dense", *FAST, "-o", "out", "--no-eval", "-q")
    Path("out/report.html").write_text("<!doctype html><title>a page</title>")
    return here / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_every_byte_arrives_in_one_commit_and_nobody_else_reads_it(result: Path, there: Hub) -> None:
    told = run("upload", "out", "me/small", "--json")
    (repository,) = there.repositories.values()
    assert repository == {"private": True, "files": contents(result)} and there.commits == ["me/small"]
    assert {"README.md", "report.html", "pruning.json", "model.safetensors"} <= repository["files"].keys()
    document = json.loads(told.stdout)
    assert document["private"] is True and document["files"].keys() == repository["files"].keys()
    assert TOKEN not in told.stdout + told.stderr


def test_a_later_result_takes_the_place_of_the_earlier_one_and_leaves_what_is_of_others(
    result: Path, there: Hub
) -> None:
    run("upload", "out", "me/small", "-q")
    there.repositories["me/small"]["files"]["notes.txt"] = b"mine"
    run("pack", "out", "-o", "packed", "-q")
    printed = run("upload", "packed", "me/small").stdout
    assert there.repositories["me/small"]["files"] == contents(Path("packed")) | {"notes.txt": b"mine"}
    assert "model.safetensors" in printed and "removed" in printed and "(private)" in printed


def test_a_public_repository_is_only_used_where_that_is_said(result: Path, there: Hub) -> None:
    run("upload", "out", "me/open", "--public", "-q")
    assert there.repositories["me/open"]["private"] is False
    assert "me/open is public; upload to it with --public" in refused("upload", "out", "me/open")
    assert there.commits == ["me/open"]


def test_what_the_hub_refuses_is_one_line_without_the_token(
    result: Path, there: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.repositories["other/theirs"] = {"private": True, "files": {}}
    there.closed.add("other/theirs")
    line = refused("upload", "out", "other/theirs")
    assert "the hub did not take other/theirs" in line and "403" in line and TOKEN not in line
    wrong = TOKEN[::-1]
    monkeypatch.setenv("HF_TOKEN", wrong)
    line = refused("upload", "out", "me/small")
    assert "the hub did not take me/small" in line and wrong not in line
    assert not there.commits


def test_without_a_login_nothing_is_asked(result: Path, there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "get_token", lambda: None)
    assert "nobody is logged in to the hub; log in with `hf auth login`" in refused("upload", "out", "me/x")
    assert not there.repositories


@pytest.mark.parametrize("name", ["small", "me/", "me/a/b", "../me", "me/..", "https://x/y", "me/a b", ""])
def test_a_name_that_is_no_repository_is_refused(name: str, there: Hub) -> None:
    assert "the repository is" in refused("upload", "dense", name) and not there.repositories


def test_a_directory_that_is_no_result_stays_here(result: Path, there: Hub) -> None:
    assert "'dense' is no result: it has no pruning.json" in refused("upload", "dense", "me/x")
    assert "no such directory: 'nowhere'" in refused("upload", "nowhere", "me/x")
    Path("out/.env").write_text("PASSWORD=1")
    assert "it also has '.env'; move that away first" in refused("upload", "out", "me/x")
    Path("out/.env").unlink()
    Path("out/vocab.txt").symlink_to(Path("text.txt").resolve())
    assert "vocab.txt' is a link" in refused("upload", "out", "me/x")
    assert not there.repositories
