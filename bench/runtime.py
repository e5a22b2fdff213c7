"""Decoding and prompts without zeros, at real shapes: random weights, packed against dense, equal precision.

    python bench/runtime.py --shape 130m --threads 1 --dtype bf16 fp32 int8 --head same int8 --json FILE

Both engines run in turn, round by round (`runtime/timing.py`); printed are medians of the rounds, and the
median of their ratios with first and third quartile. "of the bytes" is that ratio divided by how many times
fewer bytes a step reads: 1 is a speed that the bytes explain in full, the goal is 0.93 at batch 1.

Shares that are removed are those of a real run at 50 % (`--shares uniform`: half of everything); A_log loses
little in the first layers and much in the last. The dense model keeps all of its states, and its head in the
same precision unless `--dense-head same` leaves it in that of its other matrices. Options: --shape, --threads
N (default 1), --dtype (default bf16), --head (default same), --rounds N (default 9), --batches (default 1 4 8
16), --prompt N (default 512), --shares real|uniform, --json FILE.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import cpu, show
from torch import Tensor

from sparsessm import kernels
from sparsessm.checkpoint.encoding import Encoded, encode
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.measure import Measurement, Subject, measure, storage

SHAPES = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}  # d_model, layers
VOCABULARY, STATES, TAPS = 50280, 16, 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # of what is not int8 then
SHARES = {"in_proj": 0.529, "x_proj": 0.569, "dt_proj": 0.498, "out_proj": 0.430}
QUANTISED = ("in_proj", "x_proj", "out_proj")  # as `sparsessm pack --dtype int8`
LEAST, MOST, MEAN = 0.04, 0.84, 0.5  # of A_log that a layer loses
REMOVED = 38.0  # of A_log: a state that keeps no memory
GOAL = 0.93


def configuration(shape: str) -> SimpleNamespace:
    width, layers = SHAPES[shape]
    return SimpleNamespace(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        state_size=STATES,
        conv_kernel=TAPS,
        time_step_rank=width // 16,
        num_hidden_layers=layers,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
        tie_word_embeddings=True,
    )


def share(kind: str, layer: int, layers: int, shares: str) -> float:
    """Of a matrix, what is removed."""
    if shares == "uniform":
        return 0.5
    if kind != "A_log":
        return SHARES[kind]
    rise = (MOST - LEAST) / (MEAN - LEAST) - 1  # the power whose mean over the layers is MEAN
    return LEAST + (MOST - LEAST) * (layer / max(layers - 1, 1)) ** rise


def tensors(config: SimpleNamespace, shares: str) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float32 values, share that is removed) of a model; the same values every time."""
    generator = torch.Generator().manual_seed(0)
    width, inner, rank = config.hidden_size, config.intermediate_size, config.time_step_rank
    layers = config.num_hidden_layers

    def normal(*shape: int, scale: float = 0.02) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    yield "backbone.embeddings.weight", normal(VOCABULARY, width), 0.0
    for layer in range(layers):
        matrices = {
            "in_proj": (2 * inner, width),
            "x_proj": (rank + 2 * STATES, inner),
            "dt_proj": (inner, rank),
            "out_proj": (width, inner),
        }
        prefix = f"backbone.layers.{layer}."
        yield f"{prefix}norm.weight", torch.ones(width), 0.0
        for kind, shape in matrices.items():
            yield f"{prefix}mixer.{kind}.weight", normal(*shape), share(kind, layer, layers, shares)
        a_log = torch.log(torch.arange(1.0, STATES + 1)).repeat(inner, 1)
        yield f"{prefix}mixer.A_log", a_log, share("A_log", layer, layers, shares)
        yield f"{prefix}mixer.conv1d.weight", normal(inner, 1, TAPS, scale=0.3), 0.0
        yield f"{prefix}mixer.conv1d.bias", normal(inner, scale=0.1), 0.0
        yield f"{prefix}mixer.dt_proj.bias", normal(inner, scale=1.0) - 4, 0.0
        yield f"{prefix}mixer.D", torch.ones(inner), 0.0
    yield "backbone.norm_f.weight", torch.ones(width), 0.0


def encoded(
    config: SimpleNamespace, dtype: str, head: str, shares: str, dense_head: str = "int8"
) -> tuple[dict[str, Encoded], dict[str, Encoded]]:
    """A dense model, and the same without what is removed; what is not pruned is shared."""
    generator = torch.Generator().manual_seed(1)
    dense, sparse = {}, {}
    for name, values, removed in tensors(config, shares):
        large = values.ndim == 2 and not name.endswith("A_log")
        held = values.to(DTYPES[dtype]) if large else values
        quantised = (dtype == "int8" and any(kind in name for kind in QUANTISED)) or (
            head == "int8" and "embeddings" in name
        )
        dense[name] = sparse[name] = encode(name, held, int8=quantised, kind="dense")
        if dense_head == "same" and "embeddings" in name:
            dense[name] = encode(name, held, kind="dense")
        if removed:
            fill = REMOVED if name.endswith("A_log") else 0.0
            held = held.masked_fill(torch.rand(held.shape, generator=generator) < removed, fill)
            sparse[name] = encode(name, held, int8=quantised, fills=(fill,))
    return dense, sparse


def compared(shape: str, dtype: str, head: str, options: argparse.Namespace) -> Measurement:
    """Both engines of one precision, in turn."""
    config = configuration(shape)
    dense, sparse = encoded(config, dtype, head, options.shares, options.dense_head)
    subjects = []
    for name, held in (("packed", sparse), ("dense", dense)):
        engine = NativeEngine(config, held, options.threads)
        subjects.append(Subject(name, engine, config, name == "packed", storage(held)))
    del dense, sparse
    batches = options.batches if 1 in options.batches else [1, *options.batches]
    return measure(
        subjects[0],
        subjects[1],
        prompt=options.prompt,
        batches=batches,
        rounds=options.rounds,
    )


def rows(found: Measurement) -> dict[str, Any]:
    """What is printed of one comparison."""
    record = found.record()
    packed, dense = record["models"]
    fewer = 1 / record["ratios"]["bytes"]["read_per_step"]
    table: dict[str, Any] = {
        f"{model['model']}: MB a step, GB/s": f"{model['bytes']['read_per_step'] / 1e6:.1f}, "
        f"{model['gb_per_second']:.1f}"
        for model in (dense, packed)
    }
    table["times fewer bytes"] = round(fewer, 3)
    table["state, times fewer bytes"] = round(1 / record["ratios"]["bytes"]["state_per_sequence"], 3)
    for phase in found.phases:
        ratio = phase.ratio(0, 1)
        milliseconds = [1000 * phase.seconds(i).median for i in (1, 0)]
        each = f"{milliseconds[0]:.2f} -> {milliseconds[1]:.2f} ms"
        title = f"prompt of {phase.tokens}" if phase.name == "prompt" else f"decode, batch {phase.batch}"
        text = f"{each}, {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) times as fast"
        if phase.name == "decode":
            text += f", {ratio.median / fewer:.3f} of the bytes"
        if phase.name == "decode" and phase.batch == 1:
            text += f" (goal {GOAL})"
        dropped = f", {phase.dropped} dropped" if phase.dropped else ""
        disturbed = ", DISTURBED" if phase.disturbed else ""
        table[title] = f"{text}; {len(phase.rounds)} rounds{dropped}{disturbed}"
    memory = found.bandwidth
    table["memory, GB/s read, copy"] = f"{memory.read.median:.1f}, {memory.copy.median:.1f}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["130m"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--head", nargs="+", choices=("same", "int8"), default=["same"])
    parser.add_argument("--dense-head", choices=("same", "int8"), default="int8")
    parser.add_argument("--shares", choices=("real", "uniform"), default="real")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = {"cpu": cpu(), "threads": options.threads, "kernels": kernels.LEVEL, "torch": torch.__version__}
    show("machine", where)
    results: dict[str, Any] = {"machine": where, "shares": options.shares}
    for shape in options.shape:
        for dtype in options.dtype:
            for head in options.head:
                found = compared(shape, dtype, head, options)
                title = f"mamba-{shape}, {dtype}" + (", int8 head" if head == "int8" else "")
                if head == "int8" and options.dense_head == "same":
                    title += f" against {dtype} head"
                show(title, rows(found))
                results[title] = {"shown": rows(found), **found.record()}
                del found
                gc.collect()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
