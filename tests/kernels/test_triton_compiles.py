"""Triton compiles every kernel for a GPU (compiled.py), on a machine that need not have one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sources import OURS, TESTS, functions, place

pytest.importorskip("triton", reason="the extra `gpu` is missing")


def launched() -> set[str]:
    """The kernels of the package that are launched, `kernel[grid](...)`."""
    files = [tree for file, tree in OURS.items() if place(file).startswith("kernels/gpu/")]
    calls = [node.func for tree in files for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {
        call.value.id
        for call in calls
        if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)
    }
    jitted = {
        one.name
        for tree in files
        for one in functions(tree)
        if "triton.jit" in map(ast.unparse, one.decorator_list)
    }
    return names & jitted


def test_every_kernel_compiles(tmp_path: Path) -> None:
    (program,) = [file for file in TESTS if file.name == "compiled.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}  # not what another run has compiled
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(launched()) >= 7 and launched() == {*done.stdout.split()}
