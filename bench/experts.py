"""What experts that few calibration tokens reach lose on fresh tokens, with and without what they borrow.

A GraniteMoeHybrid with random weights, whose router sends some experts much and others little. The matrices
of its experts are pruned by half on more and more windows. Former: an expert that saw fewer tokens than it
has inputs was pruned by magnitude, any other by its own tokens alone. Now: methods/borrowing.py. The error is
the energy of what pruning changes in the outputs, over that of the outputs, on fresh tokens that the dense
model's router sends there; the mean over experts, and over those that saw fewer tokens than inputs.

    python bench/experts.py

With --memory: what a wider one takes in the runtime, its matrices in other forms.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import sparsessm
from sparsessm import checkpoint, runtime
from sparsessm.architectures import Architecture, adapt
from sparsessm.calibration import visit
from sparsessm.methods import borrowing
from sparsessm.methods.observers import InputGram, Moments
from sparsessm.methods.repair import output_error
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe

WINDOWS, LENGTH, FRESH, VOCABULARY = (1, 2, 4, 8, 16, 64), 64, 512, 256
DRAWN = borrowing.drawn
Seen = dict[str, Moments]


def model(seed: int, **more: Any) -> Any:
    """Two layers of eight experts, of which each token takes two; their popularity differs by far."""
    fields: dict[str, Any] = {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 16,
    }
    fields |= {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
    fields |= {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("granitemoehybrid", **fields | more)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "router" in name:
                parameter.mul_(torch.linspace(200, 20, 8)[:, None])
            elif parameter.ndim > 1:
                parameter.mul_(8)
    return made


def former(own: Moments, layer: Moments, width: int, shared: bool) -> Moments:
    """What was taken before there was borrowing; magnitude is what the identity gives."""
    if own.tokens is not None and own.tokens >= width:
        return own
    return replace(own, gram=torch.eye(width, dtype=torch.float64))


def alone(own: Moments, *_: Any) -> Moments:
    """Nothing is borrowed."""
    return own


@contextmanager
def borrowed(how: Callable[..., Moments]) -> Iterator[None]:
    """Experts borrow in another way meanwhile."""
    borrowing.drawn = how
    try:
        yield
    finally:
        borrowing.drawn = DRAWN


def looked_at(architecture: Architecture, tokens: Tensor) -> Seen:
    """The moments of each expert's inputs in the dense model."""
    with borrowed(alone):
        watch = visit.survey(architecture, tokens, lambda target: InputGram() if target.routed else None)
        return {target.name: seen for target, seen in watch if seen.tokens}


def lost(seed: int, windows: int, how: Callable[..., Moments]) -> dict[str, tuple[float, bool]]:
    """Matrix -> its error on fresh tokens, and whether it saw fewer than it has inputs."""
    draw = torch.Generator().manual_seed(seed)
    fresh, some = (torch.randint(0, VOCABULARY, (n, LENGTH), generator=draw) for n in (FRESH, max(WINDOWS)))
    dense, pruned = adapt(model(seed)), adapt(model(seed))
    truth = looked_at(dense, fresh)
    rule = {"targets": [r"re:.*\.experts\..*"], "method": "sparsegpt", "sparsity": 0.5}
    recipe = Recipe(rules=[rule]).resolved(model="random", trained_length=LENGTH)
    with borrowed(how):
        report = make_plan(recipe, pruned).run(pruned, some[:windows])
    few = {row.target: row.starved for row in report.rows}
    now = {target.name: target.matrix for target in pruned.targets}
    return {
        target.name: (
            output_error((now[target.name] - target.matrix).double(), truth[target.name].gram)
            / output_error(target.matrix.double(), truth[target.name].gram),
            few[target.name],
        )
        for target in dense.targets
        if target.name in truth
    }


def memory() -> None:
    """Print what the weights of a model take, of which experts are nine tenths."""
    asked: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
        "dense bfloat16": ({}, None),
        "half, bfloat16": ({"method": "magnitude", "sparsity": 0.5}, {}),
        "half, int8": ({"method": "magnitude", "sparsity": 0.5}, {"dtype": "int8"}),
        "dense int8": ({}, {"dtype": "int8"}),
        "4 bits": ({"method": "rtn", "grid": "int4"}, None),
    }
    wide = {"hidden_size": 256, "intermediate_size": 512, "mamba_n_heads": 16}
    print("| | MB of all weights | MB that a step reads | MB on the disk |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model(0, **wide).bfloat16().save_pretrained(folder / "dense")
        Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, "0")).save(str(folder / "words"))
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "words")).save_pretrained(folder / "dense")
        for place, (name, (recipe, packing)) in enumerate(asked.items()):
            source = folder / "dense"
            if recipe:
                came = sparsessm.load(source)
                report = sparsessm.prune(came, target="projections", measure=False, **recipe)
                source = sparsessm.save(came, folder / f"{place}", report)
            if packing is not None:
                checkpoint.pack(source, folder / f"packed {place}", **packing)
                source = folder / f"packed {place}"
            engine = runtime.load(source).engine
            stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            sizes = (f"{size / 1e6:.2f}" for size in (engine.resident, engine.nbytes, stored))
            print(f"| {name} | {' | '.join(sizes)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="random models and texts")
    parser.add_argument("--memory", action="store_true", help="the runtime's memory instead")
    asked = parser.parse_args()
    if asked.memory:
        memory()
        return
    seeds = asked.seeds
    print("| windows | matrices | with few tokens | former | now | of those with few: former | now |")
    print("|---|---|---|---|---|---|---|")
    for windows in WINDOWS:
        for kind in ("gate_up_proj", "down_proj"):
            sums: dict[str, list[tuple[float, bool]]] = {"former": [], "now": []}
            for seed in range(seeds):
                for name, how in (("former", former), ("now", DRAWN)):
                    found = lost(seed, windows, how)
                    sums[name] += [one for target, one in found.items() if f".{kind}." in target]
            few = sum(starved for _, starved in sums["now"])
            cells = [f"{sum(e for e, _ in some) / len(some):.4f}" for some in sums.values()]
            cells += [
                f"{sum(e for e, starved in some if starved) / few:.4f}" if few else "-"
                for some in sums.values()
            ]
            print(f"| {windows} | {kind} | {few} of {len(sums['now'])} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
