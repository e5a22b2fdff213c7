"""Decoding and prompts at real shapes, random weights: without zeros against dense at equal precision, or few
bits against int8.

    python bench/runtime.py --shape 130m --threads 1 --dtype bf16 fp32 int8 --head same int8 --json FILE
    python bench/runtime.py --shape 130m --bits 3.25 --batches 1 16
    python bench/runtime.py --shape 130m --shrink state=8 channel=768 --batches 1 16
    python bench/runtime.py --shape mamba2-130m --shrink state=64 head=12 direction=32 --batches 1 16

Both engines run in turn, round by round (`evaluation/timing.py`); printed are medians of the rounds, and the
median of their ratios with first and third quartile. "of the bytes" is that ratio divided by how many times
fewer bytes of weights a step reads: 1 is a speed that the bytes explain in full, the goal is 0.93 at batch 1.
"with states" counts the states too, which a step reads and writes for each sequence.

Shares that are removed are those of a real run at 50 % (`--shares uniform`: half of everything); A_log loses
little in the first layers and much in the last. The dense model keeps all of its states, and its head in the
same precision unless `--dense-head same` leaves it in that of its other matrices. With --shrink there are no
zeros: what is compared with the dense model is a dense one of fewer states, channels (of Mamba-2: of a head)
or heads, or one whose states are projected (direction). With --bits the packed model has all matrices as
codes that take so many bits in a file, whose rows and columns differ in size as those of the dial do (normal
numbers times lognormal factors, spreads 0.5 and 0.4); the dense one is int8, its head too.
Options: --shape, --bits N..., --shrink AXIS=SIZE..., --layers N (fewer than the shape has), --threads N (1),
--dtype (bf16), --head (same), --rounds N (9), --batches (1 4 8 16), --prompt N (512),
--shares real|uniform, --json FILE.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import cpu, show
from torch import Tensor

from sparsessm import kernels
from sparsessm.checkpoint.coded import Coded, ans
from sparsessm.checkpoint.encoding import Encoded, encode
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.evaluation.speed import Measurement, Subject, measure, storage
from sparsessm.kernels import entropy
from sparsessm.runtime.base import heads, model_type
from sparsessm.runtime.engine import NativeEngine

SHAPES = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}  # d_model, layers
SHAPES2 = {
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}
VOCABULARY, STATES, TAPS = 50280, 16, 4
VOCABULARY2, STATES2, HEAD, GROUPS = 50288, 128, 64, 1  # of Mamba-2; HEAD: channels of one
AXES = {"state": "state_size", "channel": "intermediate_size", "head": "num_heads"}
AXES2 = AXES | {"channel": "head_dim", "direction": "directions"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # of what is not int8 then
SHARES = {"in_proj": 0.529, "x_proj": 0.569, "dt_proj": 0.498, "out_proj": 0.430}
QUANTISED = ("in_proj", "x_proj", "out_proj")  # as `sparsessm pack --dtype int8`
LEAST, MOST, MEAN = 0.04, 0.84, 0.5  # of A_log that a layer loses
REMOVED = 38.0  # of A_log: a state that keeps no memory
GOAL = 0.93
SOME = 2048  # rows from which is seen how far codes must spread


def configuration(shape: str, layers: int | None = None, shrunken: str = "") -> SimpleNamespace:
    """That of a shape, with fewer layers if given, and with one axis shrunken ("state=8")."""
    dual = shape in SHAPES2
    width, depth = SHAPES2[shape] if dual else SHAPES[shape]
    fields = {
        "vocab_size": VOCABULARY2 if dual else VOCABULARY,
        "hidden_size": width,
        "state_size": STATES2 if dual else STATES,
        "conv_kernel": TAPS,
        "num_hidden_layers": depth if layers is None else layers,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    }
    if dual:
        fields |= {"model_type": "mamba2", "num_heads": 2 * width // HEAD, "head_dim": HEAD}
        fields |= {"n_groups": GROUPS, "time_step_limit": (0.0, math.inf)}
    else:
        fields |= {"intermediate_size": 2 * width, "time_step_rank": width // 16}
    if shrunken:
        axis, size = shrunken.split("=")
        fields[(AXES2 if dual else AXES)[axis]] = int(size)
    return SimpleNamespace(**fields)


def share(kind: str, layer: int, layers: int, shares: str) -> float:
    """Of a matrix, what is removed."""
    if shares == "none":
        return 0.0
    if shares == "uniform":
        return 0.5
    if kind != "A_log":
        return SHARES[kind]
    rise = (MOST - LEAST) / (MEAN - LEAST) - 1  # the power whose mean over the layers is MEAN
    return LEAST + (MOST - LEAST) * (layer / max(layers - 1, 1)) ** rise


def tensors(config: SimpleNamespace, shares: str) -> Iterator[tuple[str, Tensor, float]]:
    """(name, float32 values, share that is removed) of a model; the same values every time."""
    generator = torch.Generator().manual_seed(0)
    width, layers = config.hidden_size, config.num_hidden_layers

    def normal(*shape: int, scale: float = 0.02) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    yield "backbone.embeddings.weight", normal(config.vocab_size, width), 0.0
    for layer in range(layers):
        prefix = f"backbone.layers.{layer}."
        yield f"{prefix}norm.weight", torch.ones(width), 0.0
        mixer = mamba2_tensors if model_type(config) == "mamba2" else mamba1_tensors
        for name, values in mixer(config, normal):
            kind = name.removesuffix(".weight")
            lost = kind == "A_log" or (values.ndim == 2 and kind in SHARES)
            yield f"{prefix}mixer.{name}", values, share(kind, layer, layers, shares) if lost else 0.0
    yield "backbone.norm_f.weight", torch.ones(width), 0.0


def mamba1_tensors(config: SimpleNamespace, normal: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of one mixer."""
    width, inner, rank = config.hidden_size, config.intermediate_size, config.time_step_rank
    states = config.state_size
    yield "in_proj.weight", normal(2 * inner, width)
    yield "x_proj.weight", normal(rank + 2 * states, inner)
    yield "dt_proj.weight", normal(inner, rank)
    yield "out_proj.weight", normal(width, inner)
    yield "A_log", torch.log(torch.arange(1.0, states + 1)).repeat(inner, 1)
    yield "conv1d.weight", normal(inner, 1, TAPS, scale=0.3)
    yield "conv1d.bias", normal(inner, scale=0.1)
    yield "dt_proj.bias", normal(inner, scale=1.0) - 4
    yield "D", torch.ones(inner)


def mamba2_tensors(config: SimpleNamespace, normal: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of one mixer."""
    width, size = config.hidden_size, heads(config)
    yield "in_proj.weight", normal(size.inner + size.mixed + size.heads, width)
    yield "out_proj.weight", normal(width, size.inner)
    yield "A_log", torch.linspace(0, math.log(16), size.heads)
    yield "conv1d.weight", normal(size.mixed, 1, TAPS, scale=0.3)
    yield "conv1d.bias", normal(size.mixed, scale=0.1)
    yield "dt_bias", normal(size.heads, scale=1.0) - 4
    yield "norm.weight", torch.ones(size.inner)
    yield "D", torch.ones(size.heads)
    if directions := getattr(config, "directions", None):  # architectures/projected.py
        for name in ("B_projection", "C_projection"):
            yield name, normal(size.groups, directions, size.states, scale=size.states**-0.5)


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
            sparse[name] = encode(name, held, int8=quantised, removed=(fill,))
    return dense, sparse


@cache
def drawn(rows: int, columns: int, bits: float) -> dict[str, Tensor]:
    """The arrays of a random matrix of codes that take so many bits in a file, all that is stored counted."""
    generator = torch.Generator().manual_seed(2)
    by_row, by_column = (torch.randn(size, generator=generator) for size in (rows, columns))
    normal = torch.randn(rows, columns, generator=generator)
    normal *= (0.5 * by_row).exp()[:, None] * (0.4 * by_column).exp()
    spread = 2**bits / math.sqrt(2 * math.pi * math.e)  # of normal numbers whose rounded entropy that is

    def held(most: int) -> dict[str, Tensor]:
        found = entropy.encode((normal[:most] * spread).round().short().numpy())
        return {part: torch.from_numpy(array) for part, array in found.items()}

    most = min(rows, SOME)
    for _ in range(3):  # the entropy of few bits is not that of the formula, and there are tables
        stored = 8 * sum(array.nbytes for array in held(most).values()) / (most * columns)
        spread *= 2 ** (bits - stored - 8 / columns - 8 / rows)  # a factor is a byte
    return held(rows)


def coded(name: str, shape: Sequence[int], bits: float) -> Coded:
    """A matrix of random codes; those of one shape are the same."""
    rows, columns = shape
    arrays = drawn(rows, columns, bits)
    return ans(name, torch.bfloat16, arrays, *(torch.full((size,), 0.125) for size in shape))


def of_few_bits(config: SimpleNamespace, bits: float) -> tuple[dict[str, Encoded], dict[str, PackedTensor]]:
    """A dense model in int8, its head too, and one with all matrices as codes."""
    dense, _ = encoded(config, "int8", "int8", "none")
    few = dict[str, PackedTensor](dense)
    for name, tensor in dense.items():
        if len(tensor.shape) == 2 and not name.endswith("A_log"):
            few[name] = coded(name, tensor.shape, bits)
    return dense, few


def compared(
    shape: str,
    dtype: str,
    head: str,
    options: argparse.Namespace,
    shrunken: str = "",
    bits: float | None = None,
) -> Measurement:
    """Both engines of one precision, in turn."""
    config, shares = configuration(shape, options.layers), "none" if shrunken else options.shares
    dense: Mapping[str, PackedTensor]
    sparse: Mapping[str, PackedTensor]
    if bits is None:
        dense, sparse = encoded(config, dtype, head, shares, options.dense_head)
    else:
        dense, sparse = of_few_bits(config, bits)
    models = [("packed", config, sparse), ("dense", config, dense)]
    if shrunken:
        other = configuration(shape, options.layers, shrunken)
        models[0] = (shrunken, other, encoded(other, dtype, head, shares, options.dense_head)[0])
    subjects = []
    for name, its, held in models:
        engine = NativeEngine(its, held, options.threads)
        subjects.append(Subject(name, engine, its, name == "packed", storage(held)))
    del dense, sparse, models
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
    sizes = [model["bytes"] for model in record["models"]]

    def with_states(batch: int) -> float:
        """Times fewer bytes of weights and states, the latter read and written."""
        first, second = (each["read_per_step"] + 2 * batch * each["state_per_sequence"] for each in sizes)
        return second / first

    table: dict[str, Any] = {
        f"{model['model']}: MB a step, GB/s": f"{model['bytes']['read_per_step'] / 1e6:.1f}, "
        f"{model['gb_per_second']:.1f}"
        for model in (dense, packed)
    }
    table["weights, times fewer bytes"] = round(fewer, 3)
    table["state, times fewer bytes"] = round(1 / record["ratios"]["bytes"]["state_per_sequence"], 3)
    table["state, bytes"] = " -> ".join(f"{each['state_per_sequence']:,}" for each in sizes[::-1])
    for phase in found.phases:
        ratio = phase.ratio(0, 1)
        milliseconds = [1000 * phase.seconds(i).median for i in (1, 0)]
        each = f"{milliseconds[0]:.2f} -> {milliseconds[1]:.2f} ms"
        title = f"prompt of {phase.tokens}" if phase.name == "prompt" else f"decode, batch {phase.batch}"
        text = f"{each}, {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) times as fast"
        if phase.name == "decode":
            text += f", {ratio.median / fewer:.3f} of the bytes"
            text += f", {ratio.median / with_states(phase.batch):.3f} with states"
        if phase.name == "decode" and phase.batch == 1:
            text += f" (goal {GOAL})"
        dropped = f", {phase.dropped} dropped" if phase.dropped else ""
        disturbed = ", DISTURBED" if phase.disturbed else ""
        table[title] = f"{text}; {len(phase.rounds)} rounds{dropped}{disturbed}"
    memory = found.bandwidth
    table["memory, GB/s read, copy"] = f"{memory.read.median:.1f}, {memory.copy.median:.1f}"
    return table


def titled(shape: str, layers: int | None) -> str:
    """A model in words."""
    return (shape if shape in SHAPES2 else f"mamba-{shape}") + (f" of {layers} layers" if layers else "")


def told(title: str, found: Measurement, results: dict[str, Any]) -> None:
    """Print a comparison, and keep it."""
    show(title, rows(found))
    results[title] = {"shown": rows(found), **found.record()}
    gc.collect()


def axis(text: str) -> str:
    """An argument of --shrink, checked."""
    name, _, size = text.partition("=")
    if name not in AXES2 or not size.isdigit() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(AXES2)}, each with =SIZE")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=(*SHAPES, *SHAPES2), default=["130m"])
    parser.add_argument("--shrink", nargs="+", type=axis, default=[""], metavar="AXIS=SIZE")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", nargs="+", type=float, default=[])
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
    for shape, shrunken in product(options.shape, filter(None, options.shrink)):
        name, size = shrunken.split("=")
        dual = shape in SHAPES2
        if name not in (AXES2 if dual else AXES) or (name in ("state", "direction") and int(size) > STATES2):
            parser.error(f"--shrink {shrunken}: {shape} has no such axis, or not so many units")
    torch.set_num_threads(options.threads)
    where = {"cpu": cpu(), "threads": options.threads, "kernels": kernels.LEVEL, "torch": torch.__version__}
    show("machine", where)
    results: dict[str, Any] = {"machine": where, "shares": options.shares}
    for shape, dtype, head, shrunken in product(options.shape, options.dtype, options.head, options.shrink):
        if options.bits:
            break
        title = titled(shape, options.layers)
        title += f", {dtype}"
        title += ", int8 head" if head == "int8" else ""
        if head == "int8" and options.dense_head == "same":
            title += f" against {dtype} head"
        title += f", {shrunken}, dense" if shrunken else ""
        told(title, compared(shape, dtype, head, options, shrunken), results)
    for shape, bits in product(options.shape, options.bits):
        title = f"{titled(shape, options.layers)}, {bits:g} bits against int8"
        told(title, compared(shape, "int8", "int8", options, bits=bits), results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
