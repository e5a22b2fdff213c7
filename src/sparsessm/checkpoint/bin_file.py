"""One `pytorch_model.bin`, written tensor by tensor: to the byte what `torch.save` writes of them.

torch writes everything but the values, and leaves room for them (`torch.serialization.skip_data`); they are
filled in afterwards, one in memory at a time. What the archive says about them was said of the empty room:
their checksums, which other readers of zip files hold them against, and torch's fingerprint of them all.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .tensor_file import Form, raw

_FINGERPRINT = ".data/serialization_id"
# Where the checksum of a record is: in its head, behind its data, in the table at the end of the archive.
_HEAD, _BEHIND, _TABLE = 14, 4, 16
_IS_BEHIND = 8  # flag of a record: its head does not have it


def write(
    file: Path, names: Mapping[str, str], forms: Mapping[str, Form], tensor: Callable[[str], Tensor]
) -> None:
    """Write a dictionary of tensors.

    Args:
        names: name in the file -> tensor; several names of one tensor share its storage.
        forms: of the tensors.
        tensor: a tensor of the form that was said; asked for once each, in the order of `names`.

    Raises:
        ValueError: names a tensor of another form than was said.
        OSError, RuntimeError: as the file system or torch reports it.
    """
    # memory that nobody touches is not taken
    room = {name: torch.empty(forms[name].shape, dtype=forms[name].dtype) for name in names.values()}
    with open(file, "wb") as content, torch.serialization.skip_data():
        torch.save({name: room[each] for name, each in names.items()}, content)
    with zipfile.ZipFile(file) as archive:
        table, records = archive.start_dir, archive.infolist()
    by_name = {record.filename.partition("/")[2]: record for record in records}  # all are in one folder
    with open(file, "r+b") as content:
        for number, each in enumerate(room):  # torch counts storages as it meets them
            value = tensor(each)
            if (found := Form.of(value)) != forms[each]:
                raise ValueError(f"{each}: it is {found}, not {forms[each]}")
            _fill(content, by_name[f"data/{number}"], raw(value))
            del value  # before the next one is made
        if mark := by_name.get(_FINGERPRINT):
            content.seek(_start(content, mark))
            of_names = content.read(mark.file_size)[:20]
            _fill(content, mark, of_names + b"%020d" % _together(records, but=mark))
        at = table
        for record in records:
            content.seek(at + _TABLE)
            content.write(record.CRC.to_bytes(4, "little"))
            content.seek(at + 28)
            at += 46 + sum(struct.unpack("<HHH", content.read(6)))


def _start(content: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Where the data of a record begins, behind its head, its name and what is added to that."""
    content.seek(record.header_offset + 26)
    return record.header_offset + 30 + sum(struct.unpack("<HH", content.read(4)))


def _fill(content: IO[bytes], record: zipfile.ZipInfo, data: bytes | memoryview) -> None:
    """Put the data of a record into its room; its checksum beside it and into `record`."""
    if not len(data):
        return
    start = _start(content, record)
    content.seek(start)
    content.write(data)
    record.CRC = zlib.crc32(data)
    behind = record.flag_bits & _IS_BEHIND
    content.seek(start + len(data) + _BEHIND if behind else record.header_offset + _HEAD)
    content.write(record.CRC.to_bytes(4, "little"))


def _together(records: list[zipfile.ZipInfo], *, but: zipfile.ZipInfo) -> int:
    """The checksums of all records in one number, as torch combines them (`c10::hash_combine`)."""
    total, mask = 0, (1 << 64) - 1
    for record in records:
        if record is not but and record.file_size:
            total ^= (record.CRC + 0x9E3779B9 + (total << 6 & mask) + (total >> 2)) & mask
    return total
