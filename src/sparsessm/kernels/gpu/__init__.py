"""The kernels for tensors that are not on the CPU, and which of two forms runs there.

On a GPU (CUDA, and ROCm under the same name in torch) Triton compiles them, if the extra `gpu` is installed;
at the first launch it also needs the machine's C compiler. For float64, for other devices and without Triton
there is the plain torch of kernels/blocked.py. Files:

    programs.py   all functions by the names that reference.py has for them
    scan.py       the selective scan forward, and the states that the backward pass starts from
    backward.py   its gradients
    stats.py      its sums for the scores of A_log
    conv.py       the causal convolution and its gradients
    ssd.py        Mamba-2's scan forward (backward it is `ssd_chunked`)
    tiles.py      what the launches share

Inputs are read in their own dtype and views are not copied as long as their last dimension is contiguous;
computed is float32, and gradients and states are float32. There are no atomic sums and nothing is tuned by a
clock, so the same inputs give the same bits on the same kind of GPU.

None of this has run on a GPU yet. Tests run it in Triton's interpreter on the CPU and compile every kernel
for NVIDIA's sm_90; for sm_80 and AMD's gfx942 they were compiled by hand. What is said of occupancy is
counted, not measured, and nothing is known of its speed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsessm.kernels import blocked

DEVICE = "cuda"  # the type of device that Triton compiles for, whoever made the GPU


def form(x: Tensor) -> Any:
    """The module whose functions run inputs like x, which is not on the CPU; named as in reference.py."""
    made = compiled() if x.device.type == DEVICE and x.dtype != torch.float64 else None
    return blocked if made is None else made


@cache
def compiled() -> Any:
    """programs.py; None where Triton is missing."""
    try:
        from sparsessm.kernels.gpu import programs
    except ImportError:
        return None
    return programs
