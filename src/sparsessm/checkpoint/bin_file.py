"""One `pytorch_model.bin`, written tensor by tensor, to the byte what `torch.save` writes of the same tensors.

torch writes everything but the values, and leaves room for them (`torch.serialization.skip_data`); they are
filled in afterwards, one in memory at a time. What the archive says about them was said of the empty room:
their checksums, which other readers of zip files hold them against, and torch's fingerprint of them all.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .tensor_file import Form, raw

_FINGERPRINT = "archive/.data/serialization_id"  # 20 digits of the names of all records, 20 of their checksums
_MASK = (1 << 64) - 1


def write(
    file: Path, forms: Mapping[str, Form], tensor: Callable[[str], Tensor], copies: Mapping[str, str]
) -> None:
    """Write a dictionary of tensors.

    Args:
        forms: of the tensors, by name.
        tensor: the tensor of a name, of the form that was said; asked for once each, in the order of `forms`.
        copies: name -> the tensor whose storage it has too.

    Raises:
        ValueError: names a tensor of another form than was said.
        OSError, RuntimeError: as the file system or torch reports it.
    """
    # Memory that nobody touches is not taken.
    room = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in forms.items()}
    room |= {copy: room[name] for copy, name in copies.items()}
    with open(file, "wb") as content, torch.serialization.skip_data():
        torch.save(room, content)
    del room
    with zipfile.ZipFile(file) as archive:
        records, table = archive.infolist(), archive.start_dir
    sums = {record.filename: record.CRC for record in records}
    with open(file, "r+b") as content:
        for number, (name, form) in enumerate(forms.items()):
            value = tensor(name)
            if (found := Form.of(value)) != form:
                raise ValueError(f"{name}: it is {found}, not {form}")
            ...
