"""What the bits of a result depend on beside its recipe: threads, processor and packages.

A BLAS cuts up its sums by the number of threads and by the instruction set, so they round differently, and
of weights whose scores almost tie another one goes. `report` puts this into the record, `cli` compares.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsessm import kernels

CPU_INFO = Path("/proc/cpuinfo")  # Linux
_WORDS = {"instructions": "torch's instruction set"}


def current() -> dict[str, Any]:
    """Of this process, now: plain values, described in docs/checkpoint.md."""
    return {
        "threads": torch.get_num_threads(),
        "kernels": kernels.LEVEL,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": _rounding(),
        "cpu": _cpu(),
    }


def beside(device: torch.device, processes: int) -> dict[str, Any]:
    """What computed beside this processor, where anything did: a GPU's name, and how many processes."""
    found: dict[str, Any] = {}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    if processes > 1:
        found["processes"] = processes
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that a result depends on."""
    packages = ("sparsessm", "torch", "transformers")
    return {"python": platform.python_version(), **{package: installed(package) for package in packages}}


def installed(package: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same, in words; what either does not know is left out.

    Args:
        before: as a file says it, of any content. now: as `current` and the record's versions say it.
    """
    found = [
        f"{_WORDS.get(name, name)} {was!r:.60} (here {now[name]!r})"
        for name, was in before.items()
        if name != "blas" and isinstance(was, str | int) and name in now and was != now[name]
    ]
    if not found and {"blas"} <= before.keys() & now.keys() and before["blas"] != now["blas"]:
        found = ["a BLAS that rounds differently"]
    return found


def _rounding() -> str:
    """12 hex digits of what this BLAS makes of some products: others where its sums run in another order."""
    ramp = torch.arange(96 * 160, dtype=torch.float32).mul_(0.7).sin_().view(160, 96)
    gram = ramp.T @ ramp
    gram.diagonal().add_(1.0)
    parts = (gram, ramp @ gram, torch.linalg.cholesky_ex(gram)[0], (ramp @ gram[:1].T).sum())
    told = hashlib.sha256()
    for part in parts:
        told.update(part.contiguous().numpy().tobytes())
    return told.hexdigest()[:12]


def _cpu() -> str | None:
    """The processor's name, None where the system does not say it."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or None
