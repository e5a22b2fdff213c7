"""Compile every Triton kernel for a GPU that need not be here: a compiler refuses what an interpreter takes.

Run as a program, as the process of the tests interprets. Launches are caught and compiled for the types of
their arguments, a number that is 1 as a constant, as Triton does it. Nothing runs, so results are what lay in
memory. Prints the kernels, one a line.
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
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = KINDS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert made.asm["cubin"]
    print(kernel.__name__)


def launch_all() -> None:
    """Each kernel with and without what may be missing, at sizes of 1 and others."""
    from sparsessm.kernels.gpu import programs, scan

    scan.SHORTEST = 1  # so that the scan is cut into pieces of time
    for one, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        shape = (1, 1, 1, 1) if one else (2, 3, 40, 16)
        x = forms.scan_inputs(shape, dtype, gate=not one, started=not one)
        options: Any = {"removed": "memoryless" if one else "unit", "energy": True}
        for gram in ("full", "diagonal"):
            programs.selective_scan_stats(*x, **options, gram=gram, removed_state=x[7])
        programs.selective_scan_backward(x[0], *x)
        conv = forms.conv_inputs(shape[:3], 4, dtype, biased=not one, started=not one)
        programs.causal_conv1d(*conv, silu=not one)
        programs.causal_conv1d_backward(conv[0], *conv, silu=True)
        heads = (1, 1, 1, 1, 1, 1) if one else (2, 9, 2, 40, 1, 64)
        programs.ssd_scan(*forms.ssd_inputs(heads, dtype, started=not one), every=0 if one else 4)
    programs.ssd_scan(*forms.ssd_inputs((1, 1, 1, 1, 1, 1), torch.float32), every=1)


if __name__ == "__main__":
    assert "triton" not in sys.modules  # the kernels' door was imported, and needs it for a GPU only
    from triton.runtime.jit import JITFunction

    JITFunction.run = compile_launch
    launch_all()
