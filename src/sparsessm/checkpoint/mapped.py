"""Hidden states in a file instead of in memory: tensors that are a mapped file.

They are ordinary tensors; what was written lies in the file, and the pages of those that are not used can be
given back. The room on the disk is taken when one is made: a full disk is said then, and not by a signal in
the middle of a product.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Mapped:
    """The mapped tensors of one residence."""

    def __init__(self) -> None:
        # address of a tensor's first byte -> what maps it, as long as the tensor is used
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def tensor(self, folder: Path, shape: Sequence[int], file: Path | None = None) -> Tensor:
        """A float32 tensor over a file.

        Args:
            file: which, of the right size if it is there; its values are the tensor's. None: one without a
                name in `folder`, which is gone when nobody uses the tensor any more.

        Raises:
            OSError: the disk has no room for it.
        """
        size = 4 * math.prod(shape)
        handle, name = (
            tempfile.mkstemp(prefix="hidden-", dir=folder)
            if file is None
            else (os.open(file, os.O_RDWR | os.O_CREAT, 0o600), None)
        )
        try:
            if name is not None:
                os.unlink(name)
            if sys.platform == "darwin":  # it has no such call: there a full disk ends the process
                os.ftruncate(handle, size)
            else:
                os.posix_fallocate(handle, 0, size)
            mapping = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        states = torch.frombuffer(mapping, dtype=torch.float32).view(*shape)
        self._maps[states.data_ptr()] = mapping
        return states

    def release(self, states: Tensor) -> None:
        """Give the pages of a tensor back, if it is one of these; its values stay in the file."""
        mapping = self._maps.get(states.untyped_storage().data_ptr())
        if mapping is not None:
            mapping.madvise(mmap.MADV_DONTNEED)

    def flush(self, states: Tensor) -> None:
        """Wait until the values are on the disk."""
        mapping = self._maps.get(states.untyped_storage().data_ptr())
        if mapping is not None:
            mapping.flush()
