"""A result goes to the hub: one commit with all of its files, in a private repository.

Place in the flow: after everything, and only where somebody asks for it. The token is that of
huggingface_hub's own login; it is neither an option of ours nor shown.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from ..data.foreign import first_line, short
from .companions import RECORD, is_usual
from .container import PACKED
from .files import CONFIG
from .opened import open_checkpoint, quiet
from .writing import foreign

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Uploaded:
    """What came of it.

    Attributes:
        url: of the commit. files: names in the repository, with their bytes. removed: names of files of an
            earlier result that the commit takes away. private: whether the repository is.
    """

    url: str
    files: dict[str, int]
    removed: list[str]
    private: bool


def refuse_upload(directory: str | os.PathLike[str], to: str) -> dict[str, Path]:
    """Refuse what is no result, or has other things beside it; asks nobody.

    Returns:
        The files that go, by their names in the repository.

    Raises:
        ValueError: that; or a name that is not OWNER/NAME.
    """
    shown = os.fspath(directory)
    if not _NAME.fullmatch(to) or ".." in to or "--" in to:
        raise ValueError(f"the repository is {short(to)}; allowed: OWNER/NAME, as on the hub")
    if not Path(directory).is_dir():
        raise ValueError(f"no such directory: {shown!r}")
    opened = open_checkpoint(shown)
    if opened.record is None and opened.packed is None:
        raise ValueError(
            f"{shown!r} is no result: it has no pruning.json and no packed weights; only what `prune`, `fit` "
            "and `pack` write is uploaded"
        )
    if not opened.names:
        raise ValueError(f"{shown!r} has no weights")
    if other := foreign(opened.folder.path):
        raise ValueError(f"{shown!r} is not uploaded, because {other}; move that away first")
    paths = sorted(opened.folder.path.rglob("*"))
    if links := [str(path) for path in paths if path.is_symlink()]:
        raise ValueError(f"{shown!r} is not uploaded, because {links[0]!r} is a link; replace it by a file")
    return {path.relative_to(opened.folder.path).as_posix(): path for path in paths if path.is_file()}


def upload(directory: str | os.PathLike[str], to: str, *, public: bool = False) -> Uploaded:
    """Make the repository if it is not there, and commit the files of a result to it.

    Files that an earlier result left in the repository and that this one does not have are removed by the
    same commit; what is no file of a checkpoint stays.

    Args:
        to: OWNER/NAME. public: whether anybody may read a repository that is made, or that is there.

    Raises:
        ValueError: as `refuse_upload`; nobody is logged in; the repository is public and `public` is false;
            or the hub refuses, in one line.
    """
    files = refuse_upload(directory, to)
    if (token := get_token()) is None:
        raise ValueError(f"nobody is logged in to the hub; {_LOGIN}")
    api = HfApi(token=token)
    try:
        with quiet():
            try:
                there = api.model_info(to)
            except RepositoryNotFoundError:
                api.create_repo(to, private=not public)
                there = api.model_info(to)
            private = there.private is True
            if not private and not public:
                raise ValueError(f"{to} is public; upload to it with --public, or choose another name")
            names = [entry.rfilename for entry in there.siblings or ()]
            if CONFIG in names and not {RECORD, PACKED} & {*names}:
                raise ValueError(f"{to} holds another model; choose another name, or empty it first")
            removed = [name for name in names if is_usual(name) and name not in files]
            commit = api.create_commit(
                to,
                [
                    *(CommitOperationDelete(name) for name in removed),
                    *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                ],
                commit_message="Upload by sparsessm",
            )
    except ValueError:
        raise
    except Exception as error:  # a dozen kinds, by cause: offline, no permission, too large, interrupted
        told = first_line(error).replace(token, "(token)")
        raise ValueError(f"the hub did not take {to}: {told}; {_LOGIN} if it is about permissions") from None
    return Uploaded(
        commit.commit_url, {n: path.stat().st_size for n, path in files.items()}, removed, private
    )
