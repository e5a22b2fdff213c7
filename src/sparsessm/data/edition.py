"""Which text a name stands for, so that two runs on `stdlib` can be told apart.

Place in the flow: beside `data`, for the records of pruning and of evaluation.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from functools import cache

from .texts import DATASETS, Split, documents


def edition(data: str, split: Split) -> dict[str, str]:
    """Says which text a name stands for here, where that is not the same on every machine: `stdlib`.

    Every patch release of Python has another standard library, and so have the packages of a distribution.

    Returns:
        "python", the version, and "sha256", the SHA-256 (hexadecimal) of the documents of this split, each
        followed by a zero byte; empty for other data.
    """
    row = DATASETS.get(data)
    if row is None or row.source:
        return {}
    return {"python": platform.python_version(), "sha256": _digest(sysconfig.get_path("stdlib"), data, split)}


@cache
def _digest(root: str, data: str, split: Split) -> str:
    """SHA-256 of a text that does not change while a process runs; root: where it lies."""
    digest = hashlib.sha256()
    for text in documents(data, split):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
