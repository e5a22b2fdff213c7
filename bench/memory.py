"""What loading a model does to the process: its growth, and the highest point on the way, beside the weights.

    python bench/memory.py --json bench/results/memory.json

Models have the shape of mamba-130m and mamba2-130m with random weights and the tokenizer of the built-in
model. Each is loaded in a process of its own, after the built-in model was loaded there once and dropped:
imports and what torch and transformers set up at the first use (`fixed`) are not counted as growth, the
tokenizer is. The peak is the kernel's (VmHWM, set back before loading), which counts mapped files too. Of
packed files it says what share of loading the checksums take.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp32")
PACKED = "packed.safetensors"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--json", type=Path)
    options.add_argument("--vocabulary", type=int, default=50280)
    options.add_argument("--one", type=Path, help="measure this directory in this process")
    given = options.parse_args()
    if given.one:
        print(json.dumps(measured(given.one)))
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("mamba", "mamba2"):
            for name, path in models(kind, given.vocabulary, Path(folder) / kind):
                command = [sys.executable, __file__, "--one", str(path)]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rows[f"{kind}-130m {name}"] = row
                show(f"{kind}-130m {name}", row)
    if given.json:
        given.json.write_text(json.dumps({"cpu": cpu(), "rows": rows}, indent=2) + "\n")


def models(kind: str, vocabulary: int, folder: Path) -> list[tuple[str, Path]]:
    """Write the directories; returns (name, directory)."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    import sparsessm
    from sparsessm import checkpoint

    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 768, "num_hidden_layers": 24}
    if kind == "mamba":
        model: Any = MambaForCausalLM(MambaConfig(state_size=16, **sizes))
    else:
        heads = {"num_heads": 24, "head_dim": 64, "n_groups": 1, "tie_word_embeddings": True}
        model = Mamba2ForCausalLM(Mamba2Config(state_size=128, **heads, **sizes))
    words = Path(sparsessm.__file__).parent / "builtin/pycode"
    found = []
    for name, dtype in zip(DTYPES, (torch.bfloat16, torch.float32), strict=True):
        model.to(dtype).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(words / file, folder / name)
        found.append((f"stock {name}", folder / name))
    for name, how in (("bf16", {}), ("int8", {"dtype": "int8", "head": "int8"})):
        checkpoint.pack(folder / "bf16", folder / f"packed-{name}", **how)
        found.append((f"packed {name}", folder / f"packed-{name}"))
    return found


def measured(path: Path) -> dict[str, Any]:
    """Load a directory in this process: bytes, and seconds."""
    from sparsessm import runtime

    start = status("VmRSS")
    runtime.load("builtin:pycode")
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    model = runtime.load(path)
    seconds = time.perf_counter() - began
    peak, after = status("VmHWM") - before, status("VmRSS") - before
    resident = model.engine.resident
    del model
    return {
        "resident": resident,
        "growth": after,
        "peak": peak,
        "fixed": before - start,
        "seconds": seconds,
        "checksum": checksum(path / PACKED) if (path / PACKED).exists() else None,
    }


def checksum(file: Path) -> float:
    """Seconds that the checksums of a packed file take, the median of five."""
    import numpy as np

    from sparsessm.kernels.checksum import crc32c

    content, times = np.fromfile(file, np.uint8), []
    for _ in range(5):
        began = time.perf_counter()
        crc32c(content)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def status(field: str) -> int:
    """Bytes that the system says of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def show(name: str, row: dict[str, Any]) -> None:
    mb, whole = 2**20, row["resident"]
    print(
        f"{name:24} weights {whole / mb:6.0f} MiB, "
        f"growth {row['growth'] / mb:6.0f} ({row['growth'] / whole:.2f}), "
        f"peak {row['peak'] / mb:6.0f} ({row['peak'] / whole:.2f}), fixed {row['fixed'] / mb:4.0f}, "
        f"{row['seconds']:.2f} s"
        + (f", checksums {row['checksum'] / row['seconds']:.1%} of it" if row["checksum"] else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
