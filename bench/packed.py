"""What packing costs and brings on the built-in model: bytes, perplexity, KL, time, beside quantised dense.

    python bench/packed.py --json bench/results/packed.json --plot docs/packed.png

Every row is a model as it runs: perplexity and KL come from the runtime's own logits (with int8 its inputs
are rounded too), on held-out windows; KL is that of the next-token distribution from the float32 dense
model's, in nats per token. "dense 4-bit" is the dense model with its matrices rounded as llama.cpp's Q4_0
does (blocks of 32, one float16 scale), for its quality at its bytes: this runtime has no 4-bit kernels.
Decoding is timed at batch 1 and 16, all variants in turn; ratios are medians over rounds. Pruning is the
default method, 32 windows.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import kquants
import torch
from torch import Tensor

import sparsessm
from sparsessm import kernels, runtime
from sparsessm.checkpoint import pack
from sparsessm.data.texts import evaluation_windows
from sparsessm.runtime.generation import Model

MODEL = "builtin:pycode"
PRUNED: dict[str, dict[str, Any]] = {
    "dense": {},
    "30 %": {"sparsity": 0.3},
    "50 %": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "70 %": {"sparsity": 0.7},
}
PACKED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "int8"},
    "int8, head too": {"dtype": "int8", "head": "int8"},
}
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj", "embeddings")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--windows", type=int, default=32)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=Path)
    options.add_argument("--plot", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, Model] = {}
    windows = evaluation_windows("stdlib", sparsessm.load(MODEL).tokenizer, length=1024, limit=given.windows)[
        0
    ]
    truth: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        for pruning, fields in PRUNED.items():
            source = MODEL
            if fields:
                checkpoint = sparsessm.load(MODEL)
                report = sparsessm.prune(checkpoint, samples=32, **fields, measure=False)
                source = str(sparsessm.save(checkpoint, Path(folder) / pruning.replace(" ", ""), report))
            for dtype, how in PACKED.items():
                name, out = f"{pruning} {dtype}", Path(folder) / f"{pruning}-{dtype}".replace(" ", "")
                packing = pack(source, out, **how)
                models[name] = runtime.load(out, threads=given.threads)
                truth, rows[name] = quality(models[name], windows, truth)
                rows[name]["bytes"] = packing.after
                print(f"{name}: {rows[name]}", flush=True)
            if pruning == "dense":
                checkpoint = sparsessm.load(source)
                size = four_bits(checkpoint)
                truth, rows["dense 4-bit"] = quality(runtime.of(checkpoint), windows, truth)
                rows["dense 4-bit"]["bytes"] = size
    for batch in (1, 16):
        for name, spent in timed(models, batch, given.rounds).items():
            rows[name][f"ms at batch {batch}"] = spent[0]
            rows[name][f"ratio at batch {batch}"] = spent[1]
    show(rows)
    if given.json:
        machine = {"machine": platform.processor() or platform.machine(), "level": kernels.LEVEL}
        given.json.write_text(
            json.dumps({**machine, "threads": given.threads, "rows": rows}, indent=2) + "\n"
        )
    if given.plot:
        draw(rows, given.plot)


def quality(model: Model, windows: Tensor, truth: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """Perplexity and KL of a model on windows (W, L); the first model's log-probabilities are the truth."""
    told, nll, kl = [], 0.0, 0.0
    for i, window in enumerate(windows):
        log_p = model.logits(window.tolist())[:-1].log_softmax(-1)  # (L - 1, V)
        nll -= float(log_p.gather(1, window[1:, None]).double().mean()) / len(windows)
        if truth is None:
            told.append(log_p)
        else:
            kl += float((truth[i].exp() * (truth[i] - log_p)).double().sum(1).mean()) / len(windows)
    return torch.stack(told) if truth is None else truth, {"perplexity": math.exp(nll), "kl": kl}


def four_bits(checkpoint: Any) -> int:
    """Round the matrices in place as Q4_0 does; returns the bytes of all tensors so stored."""
    total = 0
    for name, tensor in checkpoint.model.state_dict().items():
        if name == "lm_head.weight":
            continue
        bits = 8.0 * checkpoint.stored[name].itemsize
        if any(kind in name for kind in MATRICES) and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            values, bits = kquants.stored(tensor, "Q4_0")
            tensor.copy_(values)
        total += round(bits * tensor.numel() / 8)
    return total


def timed(models: dict[str, Model], batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Name -> (median ms of a step, median ratio of the first model's time to its own)."""
    tokens = torch.arange(batch) + 100
    states = {name: model.engine.new_state(batch) for name, model in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model.engine.step(tokens, states[name])
            began = time.perf_counter()
            for _ in range(max(1, 64 // batch)):
                model.engine.step(tokens, states[name])
            spent[name].append((time.perf_counter() - began) / max(1, 64 // batch) * 1e3)
    first = next(iter(spent.values()))
    return {
        name: (
            statistics.median(times),
            statistics.median(a / b for a, b in zip(first, times, strict=True)),
        )
        for name, times in spent.items()
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    first = next(iter(rows.values()))
    print(f"{'':22}{'bytes':>11}{'share':>8}{'perplexity':>12}{'change':>9}{'KL':>10}  ratio at 1, 16")
    for title, row in rows.items():
        ratios = ", ".join(
            f"{row[f'ratio at batch {b}']:.2f}" for b in (1, 16) if f"ratio at batch {b}" in row
        )
        change = row["perplexity"] / first["perplexity"] - 1
        print(
            f"{title:22}{row['bytes']:>11,}{row['bytes'] / first['bytes']:>8.3f}{row['perplexity']:>12.3f}"
            f"{change:>+9.2%}{row['kl']:>10.2e}  {ratios}"
        )


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        change = 100 * (row["perplexity"] / first["perplexity"] - 1)
        if change > 10:
            continue
        colour = "tab:grey" if name.startswith("dense") else "tab:blue"
        places = [(axes[0], row["bytes"] / 1e6)]
        if "ms at batch 1" in row:
            places.append((axes[1], 1e3 / row["ms at batch 1"]))
        for axis, x in places:
            axis.plot(x, change, "o", color=colour)
            axis.annotate(
                name, (x, change), textcoords="offset points", xytext=(4, 4), fontsize=7, rotation=20
            )
    axes[0].set(xlabel="MB of weights", ylabel="change of perplexity, %")
    axes[1].set(xlabel="tokens/s, batch 1")
    figure.suptitle("builtin:pycode, packed: grey is dense, blue is pruned")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
