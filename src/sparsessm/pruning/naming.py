"""What is wrong is said of the matrix or block that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A ValueError that is raised meanwhile begins with `name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
