"""What others need for the same model, on this machine: llama.cpp, transformers, torch's linear layers, ours.

    .venv/bin/python bench/peers.py --shape 130m --threads 1 --llama LLAMA_BENCH --gguf FOLDER --json FILE

Random weights of the real shapes, a prompt of 512 tokens and 32 tokens of decode, both from an empty state.
Options: --shape 130m|370m|1.4b|2.8b, --threads N (default 1), --rounds N (default 3), --repeats N (inside one
run of llama-bench, default 3), --only models|linear.
llama.cpp's rows need its llama-bench and the files that `bench/gguf_random.py` writes; without them a line
says which were skipped. The variants run in turn, round by round, after one round that does not count;
printed are medians, and the median of the per-round ratios of time to the first variant. On one thread a
measurement whose wall and CPU time differ by more than 3 % (pre-empted) is dropped; where none is left all
are used and the line says so. On more threads nothing is dropped: see the load average and the CPU share.

Another runtime is one more function in MODELS.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from runtime import SHAPES, VOCABULARY, configuration, encoded  # bench/runtime.py
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from sparsessm.runtime.engine import NativeEngine

PROMPT, DECODED = 512, 32
DRIFT = 0.03  # of wall time, by which CPU time may fall short on one thread
SPARSITY = 0.5
COLD = 256 * 2**20  # bytes of bf16 weights that a decode-like product walks through: no cache holds them
WARM = 4  # matrices that a prompt-like product takes in turn: it is bound by arithmetic


@dataclass(frozen=True)
class Timing:
    """Seconds of what is compared, and wall and CPU seconds of the stretch in which it was measured."""

    seconds: float
    wall: float
    cpu: float


Measure = Callable[[], dict[str, Timing]]  # by the name of what it measured; all variants give the same names
Variants = dict[str, Measure]


class Skipped(Exception):
    """Why a variant cannot run here."""


def clocked(threads: int, run: Callable[[], Any]) -> Timing:
    cpu_clock = time.thread_time if threads == 1 else time.process_time
    wall, cpu = time.perf_counter(), cpu_clock()
    run()
    wall, cpu = time.perf_counter() - wall, cpu_clock() - cpu
    return Timing(wall, wall, cpu)


# Models: seconds per token of the prompt and of decode.


def llama(type_name: str) -> Callable[[argparse.Namespace], Measure]:
    def build(options: argparse.Namespace) -> Measure:
        if options.llama is None:
            raise Skipped("--llama not given")
        if options.gguf is None:
            raise Skipped("--gguf not given")
        path = options.gguf / f"mamba-{options.shape}-{type_name}.gguf"
        if not path.exists():
            raise Skipped(f"no {path.name} in --gguf: see bench/gguf_random.py")
        command = [options.llama, "-m", path, "-t", options.threads, "-r", options.repeats, "-o", "json"]

        def once(prompt: int, decoded: int) -> Timing:
            """In a process of its own, so that a disturbance costs one of the two figures only."""
            words = [str(word) for word in (*command, "-p", prompt, "-n", decoded)]
            before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # loading included
            (test,) = json.loads(done.stdout)
            return Timing(statistics.median(test["samples_ns"]) / 1e9 / (prompt + decoded), wall, cpu)

        def measure() -> dict[str, Timing]:
            return {"prompt": once(PROMPT, 0), "decode": once(0, DECODED)}

        return measure

    return build


def in_process(threads: int, prompt: Callable[[], Any], begin: Callable[[], Callable[[int], Any]]) -> Measure:
    """`prompt` reads `PROMPT` tokens up to the last one's logits; `begin`, which is not timed, gives a
    function that takes the i-th step of decode."""

    def measure() -> dict[str, Timing]:
        read = clocked(threads, prompt)
        step = begin()

        def decode() -> None:
            for i in range(DECODED):
                step(i)

        wrote = clocked(threads, decode)
        return {
            "prompt": Timing(read.wall / PROMPT, read.wall, read.cpu),
            "decode": Timing(wrote.wall / DECODED, wrote.wall, wrote.cpu),
        }

    return measure


def stock(dtype: torch.dtype) -> Callable[[argparse.Namespace], Measure]:
    def build(options: argparse.Namespace) -> Measure:
        width, layers = SHAPES[options.shape]
        config = MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=VOCABULARY)
        with torch.device("meta"):
            model: Any = MambaForCausalLM(config)
        model = model.to(dtype).to_empty(device="cpu").eval()
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.data.copy_(torch.arange(1, config.state_size + 1).log().expand_as(parameter))
            elif parameter.dim() == 1:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.data.normal_(0.0, 0.02, generator=generator)
        tokens = torch.randint(0, VOCABULARY, (1, PROMPT), generator=generator)

        def prompt() -> None:
            model(tokens, use_cache=True, logits_to_keep=1)

        def begin() -> Callable[[int], Any]:
            state = model(tokens[:, :1], use_cache=True).cache_params
            return lambda i: model(tokens[:, i : i + 1], cache_params=state, use_cache=True)

        return in_process(options.threads, prompt, begin)

    return build


@functools.cache
def engines(shape: str, dtype: str, head: str, threads: int) -> tuple[NativeEngine, NativeEngine]:
    """Dense and packed, as bench/runtime.py makes them."""
    config = configuration(shape)
    dense, sparse = (NativeEngine(config, held, threads) for held in encoded(config, dtype, head, "real"))
    return dense, sparse


def ours(dtype: str, head: str, *, packed: bool) -> Callable[[argparse.Namespace], Measure]:
    def build(options: argparse.Namespace) -> Measure:
        engine = engines(options.shape, dtype, head, options.threads)[packed]
        tokens = torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0))

        def begin() -> Callable[[int], Any]:
            state = engine.new_state(1)
            return lambda i: engine.step(tokens[i : i + 1], state)

        return in_process(options.threads, lambda: engine.prompt(tokens, engine.new_state(1)[0]), begin)

    return build


# Each is a function that takes the options and returns what measures the variant: a callable without
# arguments that gives {"prompt": Timing, "decode": Timing}, seconds per token; or it raises `Skipped` with
# the reason; `in_process` makes one of two functions. The first that can run is the one ratios are taken to.
# The project's own runtime goes last.
MODELS: dict[str, Callable[[argparse.Namespace], Measure]] = {
    "llama.cpp BF16": llama("bf16"),
    "llama.cpp Q8_0": llama("q8_0"),
    "llama.cpp Q4_0": llama("q4_0"),
    "transformers fp32": stock(torch.float32),
    "transformers bf16": stock(torch.bfloat16),
    "ours, dense bf16": ours("bf16", "same", packed=False),
    "ours, 50 % bf16": ours("bf16", "same", packed=True),
    "ours, dense int8 and head": ours("int8", "int8", packed=False),
    "ours, 50 % int8 and head": ours("int8", "int8", packed=True),
}


# Linear layers: seconds of one product.


def pruned(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CSR with 32-bit indices: faster here than torch's 64-bit default."""
    csr = (weight * (torch.rand(weight.shape, generator=generator) >= SPARSITY)).to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices().int(), csr.col_indices().int(), csr.values(), size=tuple(weight.shape)
    )


def products(rows: int, columns: int, batch: int, options: argparse.Namespace) -> Variants:
    """Products of `batch` rows with copies of a matrix that stand for the layers of the model."""
    layers = SHAPES[options.shape][1]
    copies = min(layers, math.ceil(COLD / (2 * rows * columns)) if batch == 1 else WARM)
    generator = torch.Generator().manual_seed(0)
    weights = [0.02 * torch.randn(rows, columns, generator=generator) for _ in range(copies)]
    halves = [weight.bfloat16() for weight in weights]
    sparse = [pruned(weight, generator) for weight in weights]
    x = torch.randn(batch, columns, generator=generator)
    half, upright = x.bfloat16(), x.T.contiguous()  # CSR takes columns

    def over(matrices: list[torch.Tensor], product: Callable[[torch.Tensor], Any]) -> Measure:
        def run() -> None:
            for matrix in matrices:
                product(matrix)

        def measure() -> dict[str, Timing]:
            timing = clocked(options.threads, run)
            return {"product": Timing(timing.wall / copies, timing.wall, timing.cpu)}

        return measure

    return {
        "fp32": over(weights, lambda weight: F.linear(x, weight)),
        "bf16": over(halves, lambda weight: F.linear(half, weight)),
        "CSR 50 % fp32": over(sparse, lambda weight: weight @ upright),
    }


def linear(options: argparse.Namespace) -> Iterator[tuple[str, Variants]]:
    width = SHAPES[options.shape][0]
    for name, rows, columns in (("in_proj", 4 * width, width), ("out_proj", width, 2 * width)):
        for batch in (1, 512):
            title = f"{name} {rows} x {columns}, {batch} {'row' if batch == 1 else 'rows'}"
            yield title, products(rows, columns, batch, options)


# Running and reporting.


def interleaved(variants: Variants, options: argparse.Namespace) -> dict[str, list[dict[str, Timing]]]:
    taken: dict[str, list[dict[str, Timing]]] = {name: [] for name in variants}
    for turn in range(options.rounds + 1):
        for name, measure in variants.items():
            print(f"round {turn} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            timings = measure()
            if turn:
                taken[name].append(timings)
    return taken


def summary(taken: dict[str, list[dict[str, Timing]]], threads: int) -> dict[str, Any]:
    """By variant and by what was measured: milliseconds, ratio to the first variant, how many rounds held."""

    def clean(timing: Timing) -> bool:
        return threads > 1 or abs(timing.wall - timing.cpu) <= DRIFT * timing.wall

    first = next(iter(taken.values()))
    result: dict[str, Any] = {}
    for name, rounds in taken.items():
        result[name] = {}
        for what in first[0]:
            pairs = [(ours[what], base[what]) for ours, base in zip(rounds, first, strict=True)]
            ours, base = ([t for t in side if clean(t)] or list(side) for side in zip(*pairs, strict=True))
            middle = statistics.median(t.seconds for t in ours)
            ratios = [a.seconds / b.seconds for a, b in pairs if clean(a) and clean(b)]
            result[name][what] = {
                "ms": 1000 * middle,
                "ratio": statistics.median(ratios or [middle / statistics.median(t.seconds for t in base)]),
                "rounds": len(pairs),
                "dropped": sum(not clean(a) for a, _ in pairs),
                "cpu share": statistics.median(a.cpu / a.wall / threads for a, _ in pairs),
            }
    return result


def show(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, measured in values.items():
        cells = []
        for what, of in measured.items():
            rate = "" if what == "product" else f" {1000 / of['ms']:8.1f} tokens/s"
            held = "" if not of["dropped"] else f", {of['dropped']} of {of['rounds']} rounds pre-empted"
            held += " and used all the same" if of["dropped"] == of["rounds"] else ""
            spent = f"{of['ms']:9.3f} ms  time x {of['ratio']:.2f}  CPU {of['cpu share']:.0%}"
            cells.append(f"{what}{rate} {spent}{held}")
        print(f"  {name:<18} " + "   |   ".join(cells), flush=True)


def models(options: argparse.Namespace) -> dict[str, Any]:
    variants: Variants = {}
    for name, build in MODELS.items():
        try:
            variants[name] = build(options)
        except Skipped as reason:
            print(f"skipped {name}: {reason}")
    return summary(interleaved(variants, options), options.threads)


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of llama-bench inside a round")
    parser.add_argument("--llama", type=Path, metavar="LLAMA_BENCH", help="llama.cpp's llama-bench")
    parser.add_argument("--gguf", type=Path, metavar="FOLDER", help="what bench/gguf_random.py wrote")
    parser.add_argument("--only", choices=("models", "linear"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads < 1 or options.rounds < 1 or options.repeats < 1:
        parser.error("--threads, --rounds and --repeats start at 1")
    if options.llama is not None and not options.llama.is_file():
        parser.error(f"--llama: no file {options.llama}")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Sparse ")  # torch on its CSR: in beta, invariants unchecked
    torch.set_num_threads(options.threads)
    where = {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load at the start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    shape = {"shape": options.shape, "threads": options.threads, "rounds": options.rounds}
    results: dict[str, Any] = {"machine": where, **shape, "prompt": PROMPT, "decoded": DECODED}
    with torch.inference_mode():
        if options.only != "linear":
            results["models"] = models(options)
            show(f"mamba-{options.shape}, {options.threads} thread(s), per token", results["models"])
        if options.only != "models":
            results["linear"] = {}
            for title, variants in linear(options):
                results["linear"][title] = summary(interleaved(variants, options), options.threads)
                show(title, results["linear"][title])
    where["load at the end"] = round(os.getloadavg()[0], 2)
    print(f"\nload at the end {where['load at the end']}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
