"""CRC32C (Castagnoli; RFC 3720, appendix B.4), the checksum of packed files.

Part of the kernels' door. Native where the extension is built; else NumPy, which reads many stretches of the
bytes side by side and joins what they give.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from sparsessm import kernels

_POLYNOMIAL = 0x82F63B78  # reflected
_LANES = 1024  # stretches that NumPy reads side by side


def crc32c(content: NDArray[np.uint8], before: int = 0) -> int:
    """The CRC32C of bytes that follow others.

    Args:
        content: (count,), contiguous.
        before: the checksum of the bytes before; 0 if there are none.
    """
    if kernels.NATIVE:
        return kernels.native_crc32c(content, before)
    return by_numpy(content, before)


def by_numpy(content: NDArray[np.uint8], before: int = 0) -> int:
    """The same without the extension."""
    length = len(content) // _LANES
    rest = before ^ 0xFFFFFFFF
    table = _table()
    if length:
        stretches = np.ascontiguousarray(content[: length * _LANES].reshape(_LANES, length).T)
        lanes = np.zeros(_LANES, np.uint32)
        lanes[0] = rest
        for column in stretches:
            lanes = table[(lanes ^ column) & 255] ^ (lanes >> np.uint32(8))
        rest = 0
        shift = _zeros(length)
        for lane in lanes.tolist():
            rest = _times(shift, rest) ^ lane
    for byte in content[length * _LANES :].tolist():
        rest = int(table[(rest ^ byte) & 255]) ^ rest >> 8
    return rest ^ 0xFFFFFFFF


@cache
def _table() -> NDArray[np.uint32]:
    """What each byte leaves."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> np.uint32(1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


def _times(matrix: list[int], vector: int) -> int:
    total = 0
    for bit in range(32):
        if vector >> bit & 1:
            total ^= matrix[bit]
    return total


def _zeros(count: int) -> list[int]:
    """What `count` zero bytes make of each bit of a remainder."""
    table = _table()
    power = [1 << bit >> 8 ^ int(table[1 << bit & 255]) for bit in range(32)]
    whole = [1 << bit for bit in range(32)]
    while count:
        if count & 1:
            whole = [_times(power, column) for column in whole]
        power = [_times(power, column) for column in power]
        count >>= 1
    return whole
