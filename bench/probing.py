"""What this machine can do at most, measured: the clock, bytes read a second, products a second.

`probe.cpp` is compiled for this processor by the C++ compiler that is here (`CXX`, else c++). Every figure is
the best of some tries: other work on the machine makes things slower, never faster.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("probe.cpp")
# What multiplies at a level of our kernels: floats, int8 under masks, codes (docs/roofline.md).
PRODUCTS = {
    "portable": ("floats_4", "floats_4", "floats_4"),
    "avx2": ("floats_8", "floats_8", "bytes_32"),
    "avx512": ("floats_16", "floats_16", "bytes_64"),
    "avx512vbmi2": ("floats_16", "dots_64", "dots_64"),
}
TRIES, ADDITIONS, PRODUCED = 5, 50_000_000, 2_000_000_000
MEMORY, CACHE = 256 * 2**20, 12 * 2**20  # bytes that no cache holds; that the last cache holds


def compiled() -> Any:
    """The functions of probe.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        command = [os.environ.get("CXX", "c++"), "-O2", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def fastest(threads: int, run: Callable[[int], object]) -> float:
    """Seconds, when so many threads run it at once, each with its number."""
    found = []
    for _ in range(TRIES):
        gate = threading.Barrier(threads + 1)

        def work(number: int, gate: threading.Barrier = gate) -> None:
            gate.wait()
            run(number)

        pool = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in pool:
            thread.start()
        gate.wait()
        begun = time.perf_counter()
        for thread in pool:
            thread.join()
        found.append(time.perf_counter() - begun)
    return min(found)


def reading(probe: Any, threads: int, whole: int = MEMORY) -> float:
    """Bytes a second that so many threads read together, each a part of so many bytes.

    Args:
        probe: `compiled()`.
    """
    room = np.ones(MEMORY + 64, np.uint8)
    start = room.ctypes.data + -room.ctypes.data % 64
    part, turns = whole // threads // 512 * 512, MEMORY // whole

    def read(number: int) -> None:
        for _ in range(turns):
            probe.read_bytes(ctypes.c_void_p(start + number * part), ctypes.c_int64(part))

    return part * threads * turns / fastest(threads, read)


def limits(threads: int, levels: list[str]) -> dict[str, Any]:
    """Of so many threads together.

    Returns:
        "hertz": additions that wait for each other, a second; "bytes": a second, by "memory" and "cache";
        "products": a second, by level, of floats, of int8 under masks and of codes.
    """
    probe = compiled()
    seconds = fastest(threads, lambda _: probe.chain(ctypes.c_int64(ADDITIONS)))
    found: dict[str, Any] = {"hertz": ADDITIONS / seconds, "bytes": {}, "products": {}}
    for name, whole in (("memory", MEMORY), ("cache", CACHE)):
        found["bytes"][name] = reading(probe, threads, whole)
    rates = dict[str, float]()
    for name in {name for level in levels for name in PRODUCTS[level]}:
        function = getattr(probe, name)
        took = fastest(threads, lambda _, call=function: call(ctypes.c_int64(PRODUCED)))
        rates[name] = threads * PRODUCED / took
    kinds = ("floats", "int8", "codes")
    for level in levels:
        found["products"][level] = dict(zip(kinds, (rates[name] for name in PRODUCTS[level]), strict=True))
    return found
