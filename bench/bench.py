"""`make bench`: the scan, the calibration and the pruning at the shape of mamba-130m, random weights, 2048
tokens. Prints ratios and writes JSON.

Variants are interleaved round by round and compared by the median of their per-round ratios: machines drift.
Memory is the peak of a fresh process each. Options: --rounds N [5], --windows W [8], --json FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import mamba_selective_scan  # transformers 5
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from sparsessm import kernels
from sparsessm.architectures import InMemory, adapt
from sparsessm.calibration import prices
from sparsessm.calibration.slabs import ROWS, lanes, slab_width
from sparsessm.calibration.walk import walk
from sparsessm.kernels import products
from sparsessm.kernels.ssd import ssd_scan
from sparsessm.methods import Rule, entry_methods
from sparsessm.methods.observers import InputGram
from sparsessm.methods.patterns import Unstructured
from sparsessm.pruning import entries, make_plan
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

LENGTH = 2048
WIDTH, CHANNELS, STATES, RANK = 768, 1536, 16, 48  # mamba-130m
MIB = 2**20


def model(layers: int) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=WIDTH, state_size=STATES, num_hidden_layers=layers, vocab_size=50280)
    return MambaForCausalLM(config).eval()


def interleaved(
    rounds: int, clock: Callable[[], float] = time.perf_counter, **variants: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; one warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()}


def scan(rounds: int) -> dict[str, Any]:
    """(a) One layer's scan over one window: every native level, the torch reference, and the stock block as a
    whole."""
    g = torch.Generator().manual_seed(0)
    u, z = torch.randn(2, 1, LENGTH, CHANNELS, generator=g)
    delta = F.softplus(torch.randn(1, LENGTH, CHANNELS, generator=g) - 2)
    B, C = torch.randn(2, 1, LENGTH, STATES, generator=g)
    A, D = -torch.exp(torch.randn(CHANNELS, STATES, generator=g)), torch.randn(CHANNELS, generator=g)

    def at(level: str) -> Callable[[], Any]:
        def run() -> None:
            kernels.LEVEL = level
            kernels.selective_scan(u, delta, A, B, C, D, z)

        return run

    def stock_scan() -> None:  # its loop; (batch, channels, time) as it wants them
        x, step, gate = (t.transpose(1, 2) for t in (u, delta, z))
        mamba_selective_scan(x, step, A, B.transpose(1, 2), C.transpose(1, 2), D=D, z=gate)

    dense = model(1)
    architecture = adapt(dense)
    hidden = torch.randn(1, LENGTH, WIDTH, generator=g)
    stock_block: Any = dense.backbone.layers[0]
    best = kernels.LEVELS[-1]
    with torch.inference_mode():
        times = interleaved(
            rounds,
            **{level: at(level) for level in kernels.LEVELS},
            stock_scan=stock_scan,
            our_block=lambda: architecture.blocks[0].forward(hidden),
            stock_block=lambda: stock_block(hidden),
        )
    kernels.LEVEL = best
    return {
        "ms": milliseconds(times),
        "stock scan / native": round(ratio(times, "stock_scan", best), 1),
        "reference / native": round(ratio(times, "reference", best), 1),
        "stock block / our block": round(ratio(times, "stock_block", "our_block"), 1),
    }


def scan_of_mamba2(rounds: int) -> dict[str, Any]:
    """(a2) The same window and width in heads as mamba2-130m has them: every native level, our scan of
    Mamba-1 with a head's decay written out for its channels and states, and the stock chunks."""
    heads, width, states = 24, 64, 128
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(1, LENGTH, CHANNELS + 2 * states, generator=g)  # the convolution's output
    x, B, C = wide.split([CHANNELS, states, states], -1)
    u = x.unflatten(2, (heads, width))
    delta = F.softplus(torch.randn(1, LENGTH, heads, generator=g) - 2)
    A, D = -torch.exp(2.8 * torch.rand(heads, generator=g)), torch.randn(heads, generator=g)
    each, rates = delta.repeat_interleave(width, 2), A.repeat_interleave(width)[:, None].repeat(1, states)
    skip = D.repeat_interleave(width)

    def at(level: str) -> Callable[[], Any]:
        def run() -> Tensor:
            kernels.LEVEL = level
            return ssd_scan(u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D)[0]

        return run

    def stock() -> Tensor:
        return mamba2_chunk_scan(u, delta, A, B.unsqueeze(2), C.unsqueeze(2), chunk_size=256, D=D)

    best = kernels.LEVELS[-1]
    variants: dict[str, Callable[[], Any]] = {
        **{level: at(level) for level in kernels.LEVELS[1:]},
        "selective_scan": lambda: kernels.selective_scan(x, each, rates, B, C, skip)[0],
        "stock_chunks": stock,
    }
    with torch.inference_mode():
        want = variants[best]()
        for name, run in variants.items():
            got = run().reshape(want.shape)
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name
        kernels.LEVEL = best
        times = interleaved(rounds, **variants)
    kernels.LEVEL = best
    return {
        "ms": milliseconds(times),
        "stock chunks / native": round(ratio(times, "stock_chunks", best), 1),
        "selective_scan / native": round(ratio(times, "selective_scan", best), 1),
    }


def calibration(rounds: int, windows: int) -> dict[str, Any]:
    """(b) One layer: matrix products alone, the look of each method, and the forward that hands the windows
    on."""
    architecture = adapt(model(1))
    tokens = torch.randint(0, 50280, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    mixer: Any = architecture.model.backbone.layers[0].mixer  # pyright: ignore[reportAttributeAccessIssue]
    rows = [torch.randn(LENGTH, width) for width in (WIDTH, CHANNELS, RANK, CHANNELS)]
    products = [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj]
    stops = walk(architecture, tokens)
    stop = next(stops)
    target = stop.block.target("A_log")

    def multiply() -> None:
        for _ in range(windows):
            for product, x in zip(products, rows, strict=True):
                product(x)

    def advance() -> None:
        for here in walk(architecture, tokens):
            here.advance()

    def look(method: str, diagonal: bool = False) -> Callable[[], Any]:
        row = METHODS[method]
        rule = Rule(row, Unstructured(), 0.5, "memoryless", diagonal=diagonal, length=LENGTH)
        watch = row.watch
        assert watch is not None
        return lambda: stop.look(target, watch(target.matrix, rule))

    with torch.inference_mode():
        times = interleaved(
            rounds,
            products=multiply,
            advance=advance,
            exact=look("exact"),
            exact_diagonal=look("exact", True),
            sparsessm=look("sparsessm"),
            sparsessm_vote=look("sparsessm-vote"),
        )
    per_window = {name: [second / windows for second in seconds] for name, seconds in times.items()}
    return {
        "ms per window and layer": milliseconds(per_window),
        "ratio to the layer's matrix products": {
            name: round(ratio(times, name, "products"), 2) for name in times if name != "products"
        },
    }


STAGES = {
    "hessians": (InputGram, "add"),
    "factorisation": (entries, "factorise"),
    "target": (entries, "dense_target"),
    "sweep": (entries, "sweep"),
    "refit": (entries, "refit"),
    "fisher": (prices, "output_fisher"),
    "survey": (entries, "surveyed"),
}
PRUNED = {
    "sparsegpt, projections": {"method": "sparsegpt", "target": "projections"},
    "absorb, projections, uniform": {"target": "projections", "allocation": "uniform", "price": "none"},
    "default (absorb + exact)": {},
}


def pruning(rounds: int, windows: int) -> dict[str, Any]:
    """(d) Two layers pruned to 50 %, against the floor in the same precision: two forwards of each block, one
    Gram of every projection's inputs, one Cholesky factorisation of each. Seconds of the processor."""
    tokens = torch.randint(0, 50280, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    compute = products.choose("auto").used
    blocks = adapt(model(2)).blocks
    linear: list[Any] = list(blocks[0].linear().values())
    rows = [torch.randn(ROWS, part.in_features).T for part in linear]
    definite = [(x @ x.T).double() + torch.eye(len(x)) for x in rows]
    hidden = torch.randn(windows, LENGTH, WIDTH)
    width = slab_width(LENGTH)

    def floor() -> None:
        for block in (*blocks, *blocks):
            with block.computing(compute):
                for part in lanes(windows, LENGTH):
                    state = None
                    for slab in hidden[part].split(width, 1):
                        _, state = block.forward(slab, state)
        for _ in blocks:
            sums = [products.Sum() for _ in rows]
            with products.computing(compute):
                for _ in range(windows * LENGTH // ROWS):
                    for total, x in zip(sums, rows, strict=True):
                        total.add(x, x)  # half of it is made
            for total, hessian in zip(sums, definite, strict=True):
                total.take()
                torch.linalg.cholesky(hessian)

    def run(fields: dict[str, str], memory: int | None = None) -> Callable[[], Any]:
        def once() -> None:
            dense = adapt(model(2), compute=compute, residence=InMemory(memory))
            recipe = Recipe(**fields, compute=compute).resolved(model="random", trained_length=LENGTH)
            make_plan(recipe, dense).run(dense, tokens)

        return once

    def build() -> None:
        adapt(model(2))

    with torch.inference_mode(False), torch.no_grad():
        runs = {name: run(fields) for name, fields in PRUNED.items()}
        runs |= {f"{name}, keeping nothing": run(fields, 0) for name, fields in PRUNED.items()}  # no room
        times = interleaved(rounds, time.process_time, floor=floor, build=build, **runs)
    result: dict[str, Any] = {
        "products": compute,
        "seconds": {name: round(statistics.median(t), 2) for name, t in times.items()},
    }
    for name, once in runs.items():
        each = zip(times[name], times["build"], times["floor"], strict=True)
        result[f"{name} / floor"] = round(statistics.median((a - b) / c for a, b, c in each), 2)
        result[f"stages of {name}, s"] = stages(once, time.process_time)
    return result


def stages(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds inside the functions of `STAGES`, and what is left: forwards, scans, data on the move."""
    spent = dict.fromkeys(STAGES, 0.0)
    nested: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nested.append(name)
            start = clock()
            try:
                return function(*args, **options)
            finally:
                nested.pop()
                if not nested:
                    spent[name] += clock() - start

        return call

    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in STAGES.items()}
    for name, (owner, attribute) in STAGES.items():
        setattr(owner, attribute, timed(name, originals[name]))
    start = clock()
    try:
        run()
    finally:
        for name, (owner, attribute) in STAGES.items():
            setattr(owner, attribute, originals[name])
    whole = clock() - start
    spent["forwards and the rest"] = whole - sum(spent.values())
    return {name: round(seconds, 2) for name, seconds in spent.items()}


def peak(layers: int, windows: int, fields: dict[str, str]) -> dict[str, float]:
    """(c) In this process: MiB of the weights, and of the peak of a pruning beyond what was resident."""
    dense = model(layers)
    architecture = adapt(dense)
    tokens = torch.randint(0, 50280, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(**fields).resolved(model="random", trained_length=LENGTH)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    make_plan(recipe, architecture).run(architecture, tokens)
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    return {"weights": weights / MIB, "pruning": _status("VmHWM") - before}


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(windows: int) -> dict[str, Any]:
    buffer = windows * LENGTH * WIDTH * 4 / MIB
    hessians = sum(width**2 for width in (WIDTH, CHANNELS, RANK, CHANNELS)) * 8 / MIB
    result: dict[str, Any] = {
        "residual stream of the windows, MiB": round(buffer),
        "one block's Hessians in float64, MiB": round(hessians),
    }
    for name, fields in {"exact, A_log": {"target": "ssm", "allocation": "uniform"}, **PRUNED}.items():
        for layers in (2, 8):
            code = f"import json, bench; print(json.dumps(bench.peak({layers}, {windows}, {fields})))"
            here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
            out = subprocess.run(
                [sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True
            )
            measured = json.loads(out.stdout.splitlines()[-1])
            result[f"{name}, {layers} layers, MiB"] = round(measured["pruning"])
    return result


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def show(title: str, values: dict[str, Any], indent: str = "") -> None:
    print(f"{indent}{title}")
    for name, value in values.items():
        if isinstance(value, dict):
            show(name, value, indent + "  ")
        else:
            print(f"{indent}  {name:<28} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    where = {
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.LEVEL,
        "torch": torch.__version__,
    }
    show("machine", where)
    results = {"machine": where, "shape": "mamba-130m, 2048 tokens"}
    for title, run in (
        ("(a) scan", lambda: scan(options.rounds)),
        ("(a2) scan of mamba-2", lambda: scan_of_mamba2(options.rounds)),
        ("(b) calibration", lambda: calibration(options.rounds, options.windows)),
        ("(c) memory", lambda: memory(options.windows)),
        ("(d) pruning two layers", lambda: pruning(options.rounds, options.windows)),
    ):
        results[title] = run()
        show(title, results[title])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
