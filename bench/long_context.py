"""What a longer context costs: bytes of a sequence's state, and tokens a second behind so many tokens.

    python bench/long_context.py --models FOLDER --json bench/results/long_context.json --plot docs
    python bench/long_context.py --table                        # prints what was measured

A pure model, with all its states and with half of them; a hybrid with attention in every layer, one with
attention in every tenth, and one of the delta rule; keys and values in float32 and in int8. Random weights
in int8, with the periods of layers of bench/hybrids.py, extrapolated where those are not all. The keys of
the context are zeros: a step takes the same time, and no prompt has to be read. All lengths and both forms
in turn, medians. Options: --threads N (2), --rounds N (5), --shape NAME..., --plot FOLDER (long-context.png).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench import cpu
from hybrids_files import MOST, PURE, depths, extrapolated, made

from sparsessm import kernels, runtime
from sparsessm.runtime.keys import FORMS

RESULTS = Path(__file__).parent / "results/long_context.json"
MODELS = (*PURE, "falcon-h1-0.5b", "granite-4.0-h-micro", "qwen3.5-0.8b")
LENGTHS = (1024, 4096, 16384, 65536)
STEPS = 4


def engines(path: Path, shape: str, threads: int) -> dict[str, Any]:
    """By the form of keys and values; a pure model has none."""
    forms = ("float32",) if shape in PURE else FORMS
    return {form: runtime.load(path, threads=threads, keys=form).engine for form in forms}


def behind(engine: Any, tokens: int) -> torch.Tensor:
    """The state of one sequence (1, n), as if so many tokens had been read."""
    states = engine.keys.room(engine.new_state(1), tokens + 256)
    if engine.keys.block:
        states[:, engine.keys.fixed - 1] = tokens
    return states


def measured(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Form of keys -> length -> bytes and milliseconds, each with both numbers of periods."""
    found: dict[str, Any] = {}
    token = torch.zeros(1, dtype=torch.int64)
    for periods in depths(shape, MOST):
        path = made(options.models, shape, periods, "int8", None)
        both = engines(path, shape, options.threads)
        times: dict[tuple[str, int], list[float]] = {}
        for number in range(options.rounds + 1):  # the first is for caches
            for form, engine in both.items():
                for length in LENGTHS:
                    states = behind(engine, length)
                    engine.step(token, states)
                    begun = time.perf_counter()
                    for _ in range(STEPS):
                        engine.step(token, states)
                    if number:
                        times.setdefault((form, length), []).append((time.perf_counter() - begun) / STEPS)
                    del states
        for (form, length), seen in times.items():
            row = found.setdefault(form, {}).setdefault(str(length), {"bytes": [], "ms": []})
            row["bytes"].append(both[form].keys.size(length) * 4)
            row["ms"].append(1e3 * statistics.median(seen))
        del both, engine
        gc.collect()
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, list[float], list[float]]]:
    """Name, then for each of `LENGTHS` megabytes of a state and tokens a second."""
    whole = []
    for shape, forms in found["models"].items():
        for form, lengths in forms.items():
            periods, cells = depths(shape, MOST), [lengths[str(n)] for n in LENGTHS]
            sizes = [extrapolated(shape, periods, cell["bytes"]) / 1e6 for cell in cells]
            speeds = [1e3 / extrapolated(shape, periods, cell["ms"]) for cell in cells]
            whole.append((shape + (f", keys in {form}" if shape not in PURE else ""), sizes, speeds))
    return whole


def table(found: dict[str, Any]) -> None:
    print("| MB of a state, tokens/s behind | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for name, sizes, speeds in rows(found):
        cells = (f"{size:,.1f}, {speed:.1f}" for size, speed in zip(sizes, speeds, strict=True))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def plotted(found: dict[str, Any], folder: Path) -> None:
    from matplotlib.figure import Figure  # heavy

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shapes = list(found["models"])
    for name, sizes, speeds in rows(found):
        color = f"C{next(i for i, shape in enumerate(shapes) if name.split(', keys')[0] == shape)}"
        style = "--" if name.endswith("int8") else "-"
        left.plot(LENGTHS, sizes, style, color=color, marker="o", label=name)
        right.plot(LENGTHS, speeds, style, color=color, marker="o", label=name)
    for axes, title in ((left, "state of a sequence, MB"), (right, "tokens per second, one sequence")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
        axes.set_xlabel("tokens before")
        axes.set_title(title)
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize="small")
    figure.savefig(folder / "long-context.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path)
    parser.add_argument("--shape", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {"models": {}}
    if not options.table:
        if options.models is None:
            parser.error("--models is missing")
        found |= {"cpu": cpu(), "kernels": kernels.LEVEL, "threads": options.threads}
        for shape in options.shape:
            found["models"][shape] = measured(shape, options)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    table(found)
    if options.plot:
        plotted(found, options.plot)


if __name__ == "__main__":
    main()
