"""How small should it be? The built-in models in every form that can be had here, against what it costs.

    python bench/frontier.py --plot docs

Every row is a whole model as it runs: perplexity (change in % against the dense model) and KL of the
next-token distribution from the dense model's (nats a token) come from the runtime's own logits, on 32
held-out windows of 512 tokens that no calibration sees. Means over calibration seeds 0, 1 and 2 (32 windows
of 512 tokens), in brackets the least and the greatest; without brackets of seed 0, or no text was needed.
Bytes are those of the weights' file, and of the weights in memory when our runtime has loaded it. Decoding is
timed at batch 1, the rows of TIMED in turn, one thread; ratios to the dense model are medians over rounds, of
models that a cache holds.
Rows of llama.cpp (kquants.py; no importance matrix) keep a tied embedding in Q6_K as llama.cpp does, and all
small tensors in our dtypes; they are not timed. "alone": without our target, prices and dial.
Every run is kept in the JSON file and not repeated; `--again` forgets them. Options: --model NAME (both by
default), --row NAME (all), --rounds N, --json FILE, --plot FOLDER (frontier-bytes.png, frontier-speed.png).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kquants
import torch
from bench import cpu
from torch import Tensor

import sparsessm
from sparsessm import kernels, runtime
from sparsessm.checkpoint import pack
from sparsessm.data.texts import evaluation_windows
from sparsessm.runtime.generation import Model

MODELS = {"builtin:pycode": "Mamba-1", "builtin:pycode2": "Mamba-2"}
SEEDS = (0, 1, 2)
SAMPLES, WINDOWS, LENGTH = 32, 32, 512
MOST = 30  # per cent: rows that lose more are not in the pictures
Fields = dict[str, Any]
Runs = dict[str, list[dict[str, Any]]]  # by row

WHOLE: Fields = {"target": "matrices"}
DIAL = (6, 4.25, 3.25, 2.75, 2.25)
# Name -> recipes one after the other, and how the result is packed.
ROWS: dict[str, tuple[list[Fields], Fields]] = {
    "dense, bf16": ([], {"dtype": "bf16"}),
    "dense, int8": ([], {"dtype": "int8", "head": "int8"}),
    **{f"one dial, {bits:g} bits": ([{"bits": bits, **WHOLE}], {}) for bits in DIAL},
    "half removed, bf16": ([{"sparsity": 0.5}], {"dtype": "bf16"}),
    "half removed, int8": ([{"sparsity": 0.5}], {"dtype": "int8", "head": "int8"}),
    "2:4, bf16": ([{"pattern": "2:4"}], {"dtype": "bf16"}),
    "a quarter narrower, bf16": ([{"pattern": "structured", "sparsity": 0.25}], {"dtype": "bf16"}),
    "a tenth narrower, 3.25 bits": (
        [{"pattern": "structured", "sparsity": 0.1}, {"bits": 3.25, **WHOLE}],
        {},
    ),
    "half of the states, 3.25 bits": (
        [{"pattern": "structured:state", "sparsity": 0.5}, {"bits": 3.25, **WHOLE}],
        {},
    ),
    **{
        f"gptq alone, {bits} bits": ([{"method": "gptq", "grid": f"int{bits}", **WHOLE}], {})
        for bits in (4, 3)
    },
    **{
        f"rounded alone, {bits} bits": ([{"method": "rtn", "grid": f"int{bits}", **WHOLE}], {})
        for bits in (4, 3)
    },
}
TIMED = (
    "dense, bf16",
    "dense, int8",
    *(f"one dial, {bits:g} bits" for bits in (4.25, 3.25, 2.25)),
    "half removed, bf16",
    "half removed, int8",
    "2:4, bf16",
    "a quarter narrower, bf16",
)
REPEATED = tuple(f"one dial, {bits:g} bits" for bits in (4.25, 3.25, 2.25))  # with every seed
LLAMA = {f"llama.cpp {kind}": kind for kind in ("Q8_0", "Q5_0", "Q4_0", "Q3_K", "Q2_K")}
EMBEDDING = "Q6_K"  # of llama.cpp's files with fewer than 8 bits, where head and embedding are one
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj", "embeddings")


class Yardstick:
    """The dense model's answers on the held-out windows of one model."""

    def __init__(self, model: str) -> None:
        checkpoint = sparsessm.load(model)
        self.windows = evaluation_windows("stdlib", checkpoint.tokenizer, length=LENGTH, limit=WINDOWS)[0]
        self._truth = [self._told(runtime.of(checkpoint), window) for window in self.windows]
        self.dense = self._perplexity(self._truth)

    @staticmethod
    def _told(model: Model, window: Tensor) -> Tensor:
        return model.logits(window.tolist())[:-1].log_softmax(-1)  # (L - 1, V)

    def _perplexity(self, told: list[Tensor]) -> float:
        pairs = zip(told, self.windows, strict=True)
        return math.exp(-statistics.mean(float(p.gather(1, w[1:, None]).double().mean()) for p, w in pairs))

    def of(self, model: Model) -> dict[str, float]:
        """Change of perplexity and KL."""
        told = [self._told(model, window) for window in self.windows]
        pairs = zip(self._truth, told, strict=True)
        kl = statistics.mean(float((p.exp() * (p - q)).double().sum(1).mean()) for p, q in pairs)
        return {"change": self._perplexity(told) / self.dense - 1, "kl": kl, "dense": self.dense}


def made(model: str, name: str, seed: int, folder: Path) -> Path:
    """The directory of a row, packed."""
    recipes, packing = ROWS[name]
    source = model
    for number, fields in enumerate(recipes):
        checkpoint = sparsessm.load(source)
        how: Fields = {"samples": SAMPLES, "length": LENGTH, "seed": seed, "compute": "float32"}
        report = sparsessm.prune(checkpoint, **how, **fields, measure=False)
        source = str(sparsessm.save(checkpoint, folder / str(number), report))
    if packing:
        pack(source, folder / "packed", **packing)
        return folder / "packed"
    return Path(source)


def quality(yardstick: Yardstick, model: str, name: str, seed: int) -> dict[str, Any]:
    """A run of a row."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = made(model, name, seed, Path(folder))
        loaded = runtime.load(out, threads=torch.get_num_threads())
        size = (out / "packed.safetensors").stat().st_size
        found = {**yardstick.of(loaded), "bytes": size, "resident": loaded.engine.resident}
    return {**found, "seconds": round(time.perf_counter() - began, 1), "cpu": cpu(), "kernels": kernels.LEVEL}


def llama(yardstick: Yardstick, model: str, kind: str) -> dict[str, Any]:
    """A format of llama.cpp, of all matrices."""
    checkpoint, total = sparsessm.load(model), 0.0
    for name, tensor in checkpoint.model.named_parameters():
        bits = 8.0 * checkpoint.stored[name].itemsize
        if tensor.ndim == 2 and any(part in name for part in MATRICES):
            small = kind != "Q8_0" and "embeddings" in name
            values, bits = kquants.stored(tensor.detach(), EMBEDDING if small else kind)
            tensor.data.copy_(values)
        total += bits * tensor.numel() / 8
    return {**yardstick.of(runtime.of(checkpoint)), "bytes": round(total), "resident": None, "cpu": cpu()}


class Kept:
    """Runs that were made before, in a file."""

    def __init__(self, path: Path, again: bool) -> None:
        self._path = path
        self.found: dict[str, Any] = {}
        if path.exists() and not again:
            self.found = json.loads(path.read_text())

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = make()
            self._path.write_text(json.dumps(self.found, indent=1) + "\n")
        return self.found[name]


def speeds(model: str, rows: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of a row's model at batch 1, and how many times the dense model's speed."""
    spent: dict[str, list[float]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for number, name in enumerate(rows):
            (inner := Path(folder) / str(number)).mkdir()
            loaded[name] = runtime.load(made(model, name, 0, inner), threads=1)
        states = {name: one.engine.new_state(1) for name, one in loaded.items()}
        tokens = torch.tensor([100])
        for _ in range(rounds):
            for name, one in loaded.items():
                one.engine.step(tokens, states[name])
                began = time.perf_counter()
                for _ in range(64):
                    one.engine.step(tokens, states[name])
                spent[name].append((time.perf_counter() - began) / 64)
    first = spent[rows[0]]
    return {
        name: {
            "tokens_per_second": 1 / statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(first, times, strict=True)),
        }
        for name, times in spent.items()
    }


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def show(model: str, rows: Runs, timed: dict[str, dict[str, float]]) -> None:
    print(f"\n| {MODELS[model]} | MB on disk | MB in memory | perplexity, change in % | KL | speed |")
    print("|---|---|---|---|---|---|")
    for name, runs in sorted(rows.items(), key=lambda item: -mean(item[1], "bytes")):
        changes = [100 * run["change"] for run in runs]
        range_ = f" ({min(changes):+.2f} to {max(changes):+.2f})" if len(changes) > 1 else ""
        memory = f"{mean(runs, 'resident') / 1e6:.2f}" if runs[0]["resident"] else ""
        speed = f"{timed[name]['ratio']:.2f}" if name in timed else ""
        cells = [f"{mean(runs, 'bytes') / 1e6:.2f}", memory, f"{statistics.mean(changes):+.2f}{range_}"]
        print(f"| {name} | {' | '.join(cells)} | {mean(runs, 'kl'):.4f} | {speed} |", flush=True)


def draw(found: dict[str, Runs], timed: dict[str, Any], folder: Path) -> None:
    """Both pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"one dial": "tab:blue", "llama.cpp": "tab:orange", "gptq": "tab:red", "rounded": "tab:pink"}
    for file, label in (
        ("frontier-bytes", "MB of weights on disk"),
        ("frontier-speed", "tokens/s, batch 1, one thread"),
    ):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for axis, (model, rows) in zip(axes, found.items(), strict=False):
            for name, runs in rows.items():
                change = 100 * mean(runs, "change")
                if file == "frontier-bytes":
                    place = mean(runs, "bytes") / 1e6
                elif name in timed[model]:
                    place = timed[model][name]["tokens_per_second"]
                else:
                    continue
                if change > MOST:
                    continue
                colour = next((c for part, c in colours.items() if name.startswith(part)), "tab:grey")
                axis.plot(place, max(change, 0.01), "o", color=colour)
                text = name.removeprefix("one dial, ").removeprefix("llama.cpp ")
                how: Fields = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
                axis.annotate(text, (place, max(change, 0.01)), **how)
            axis.set(
                xlabel=label,
                ylabel="change of perplexity, %",
                title=f"{MODELS[model]} ({model})",
                yscale="log",
            )
            axis.grid(alpha=0.3)
        figure.suptitle("blue: one dial · red: GPTQ · pink: rounded · orange: llama.cpp · grey: others")
        figure.savefig(folder / f"{file}.png", dpi=110)


def measured(model: str, names: list[str], kept: Kept, rounds: int) -> tuple[Runs, dict[str, Any]]:
    """The rows of a model, printed, and their speeds."""
    yardstick, rows = Yardstick(model), {}
    for name in names:
        if name in LLAMA:
            rows[name] = [kept(f"{model} {name}", partial(llama, yardstick, model, LLAMA[name]))]
            continue
        seeds = SEEDS if name.startswith(REPEATED) else SEEDS[:1]
        rows[name] = [
            kept(f"{model} {name}, seed {seed}", partial(quality, yardstick, model, name, seed))
            for seed in seeds
        ]
        print(f"{model}, {name}: {100 * mean(rows[name], 'change'):+.2f} %", flush=True)
    ours = [name for name in rows if name in TIMED]
    timed = kept(f"{model} speeds of {', '.join(ours)}", partial(speeds, model, ours, rounds)) if ours else {}
    show(model, rows, timed)
    return rows, timed


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", choices=list(MODELS), action="append")
    options.add_argument("--row", choices=[*ROWS, *LLAMA], action="append")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "frontier.json")
    options.add_argument("--again", action="store_true")
    options.add_argument("--plot", type=Path)
    given = options.parse_args()
    kept = Kept(given.json, given.again)
    found: dict[str, Runs] = {}
    timed: dict[str, Any] = {}
    for model in given.model or MODELS:
        found[model], timed[model] = measured(model, given.row or [*ROWS, *LLAMA], kept, given.rounds)
    if given.plot:
        draw(found, timed, given.plot)


if __name__ == "__main__":
    main()
