"""Compile every Triton kernel for a GPU that need not be here: a compiler refuses what an interpreter takes.

Run as a program, as the process of the tests interprets. Launches are caught and compiled for the types of
their arguments; nothing runs, so results are whatever lay in memory. Prints the kernels, one a line.
"""

from __future__ import annotations

import sys
from typing import Any

import forms
import torch

KINDS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **options: Any) -> None:
    """In place of `JITFunction.run`: for NVIDIA's sm_90, to the machine code that a GPU would load."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = KINDS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert made.asm["cubin"]
    print(kernel.__name__)


def launch_all() -> None:
    """Each kernel with and without what may be missing."""
    from sparsessm.kernels.gpu import programs, scan

    x = forms.scan_inputs((2, 3, 40, 16), torch.float32)
    scan.SHORTEST = 1  # so that the scan is cut into pieces of time
    low = [*forms.scan_inputs((2, 3, 40, 16), torch.bfloat16, gate=False, started=False)]
    programs.selective_scan_stats(*x, removed="unit", energy=True, gram="full", removed_state=x[7])
    programs.selective_scan_stats(*low, energy=True, gram="diagonal")
    programs.selective_scan_backward(x[0], *x)
    programs.selective_scan_backward(low[0], *low)
    for conv, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        given = forms.conv_inputs((2, 9, 40), 4, dtype, biased=conv, started=conv)
        programs.causal_conv1d(*given, silu=conv)
        programs.causal_conv1d_backward(given[0], *given, silu=conv)
    programs.ssd_scan(*forms.ssd_inputs((2, 9, 2, 40, 1, 64), torch.float32), every=4)
    programs.ssd_scan(*forms.ssd_inputs((2, 9, 2, 40, 1, 64), torch.bfloat16, started=False))


if __name__ == "__main__":
    assert "triton" not in sys.modules  # the kernels' door was imported, and needs it for a GPU only
    from triton.runtime.jit import JITFunction

    JITFunction.run = compile_launch
    launch_all()
