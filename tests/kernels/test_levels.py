"""Which code this processor can run, against what the kernel of the system says of it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from sparsessm import kernels
from sparsessm.kernels import products

CPUINFO = Path("/proc/cpuinfo")
NEEDED = {  # in Linux's words
    "avx2": {"avx2", "fma", "popcnt", "bmi1"},
    "avx512": {"avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx512vbmi2": {"avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vnni"},
}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(),
    reason="/proc/cpuinfo of x86-64 is what is compared with",
)
def test_levels_are_those_that_the_system_knows() -> None:
    lines = [line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")]
    known = set.intersection(*({*line.partition(":")[2].split()} for line in lines))  # cores may differ
    able = [name for name, needed in NEEDED.items() if needed <= known]
    assert kernels.LEVELS == ("reference", "portable", *able)
    if kernels.LEVEL == kernels.LEVELS[-1]:  # else an older processor is played
        assert ("avx512bf16" in products.units()) == (NEEDED["avx512"] | {"avx512_bf16"} <= known)
