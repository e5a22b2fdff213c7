"""Q4_0 in llama.cpp: its own rounding of the dense model beside `prune --grid q4_0`, perplexity and logits.

    python3.11 -m venv llama && llama/bin/pip install cyllama==0.2.18  # with llama.cpp b9190, compiled
    .venv/bin/python bench/gguf_q4_0.py --python llama/bin/python

Change of held-out perplexity in % against the dense model (our runtime, float32) on 32 windows of 512 tokens
that no calibration sees; 32 calibration windows of 512 tokens, seeds 0, 1 and 2: mean, and in brackets least
and greatest. Twice: "as pruned" is the file's weights in float32 in our runtime, "in llama.cpp" what that
computes with the file; it rounds the inputs of quantised matrices to Q8_0. Between these two: the largest
difference of two logits, as a share of the largest logit, KL in nats a token, and how often the most probable
token is the same. Of every file that was pruned all weights are asked to be those of the pruned model, to the
bit; and its logits in a file of type f32 are compared with those of transformers, over two windows ("f32").
Every run is kept in the JSON file and not repeated, so that without options this prints the tables again;
`--again` forgets them. Options: --model NAME (both by default), --json FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from bench import cpu
from gguf_logits import compared, computed
from torch import Tensor

import sparsessm
from sparsessm import runtime
from sparsessm.checkpoint import export
from sparsessm.data.texts import evaluation_windows
from sparsessm.recipe.recipe import Recipe

MODELS = ("builtin:pycode", "builtin:pycode2")
SEEDS = (0, 1, 2)
SAMPLES, WINDOWS, LENGTH = 32, 32, 512
Fields = dict[str, Any]
# What is pruned (None: nothing), and the type of embedding and head, which are one.
ROWS: dict[str, tuple[Fields | None, str | None]] = {
    "llama.cpp's Q4_0": (None, None),
    "llama.cpp's Q4_0, embedding in Q8_0": (None, "q8_0"),
    "llama-quantize's Q4_0 (embedding in Q6_K)": (None, "llama-quantize"),
    "gptq --grid q4_0": ({"method": "gptq"}, None),
    "--grid q4_0": ({}, None),
    "--grid q4_0 --target projections, embedding in Q8_0": ({"target": "projections"}, "q8_0"),
}
REFUSED = {("builtin:pycode", "llama-quantize")}  # llama_model_quantize has no Q4_0 for dt_proj's rows of 16
NAMES = {"ssm_in": "in_proj", "ssm_x": "x_proj", "ssm_dt": "dt_proj", "ssm_out": "out_proj"}
QUANTIZE = """
import sys
from cyllama.llama import llama_cpp
llama_cpp.llama_backend_init()
llama_cpp.disable_logging()
options = llama_cpp.LlamaModelQuantizeParams()
options.ftype, options.nthread = 2, 1
llama_cpp.model_quantize(sys.argv[1], sys.argv[2], options)
"""


def as_in(file: Path, model: Any) -> None:
    """Give a model the values of the file's matrices."""
    with torch.no_grad():
        for tensor in gguf.GGUFReader(file).tensors:
            name = "backbone.embeddings.weight" if tensor.name == "token_embd.weight" else ""
            if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)) and match[2] in NAMES:
                name = f"backbone.layers.{match[1]}.mixer.{NAMES[match[2]]}.weight"
            if name:
                whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                model.get_parameter(name).copy_(torch.tensor(whole))


def logits(checkpoint: Any, windows: Tensor) -> Tensor:
    wide = dict.fromkeys(checkpoint.stored, torch.float32)  # in the stock dtype values would be rounded
    model = runtime.of(replace(checkpoint, stored=wide))
    return torch.stack([model.logits(window.tolist()) for window in windows])


def perplexity(found: Tensor, windows: Tensor) -> float:
    told = found[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
    return math.exp(-float(told.double().mean()))


class Measure:
    """Runs what a row says, each once."""

    def __init__(self, path: Path, again: bool, python: str | None) -> None:
        self._path, self._python = path, python
        self._done: dict[str, Any] = {}
        if path.exists() and not again:
            self._done = json.loads(path.read_text())["runs"]
        self._dense: dict[str, Any] = {}

    def __call__(self, model: str, row: str, seed: int) -> dict[str, Any]:
        name = f"{model} | {row} | {seed}"
        if name not in self._done:
            if self._python is None:
                raise SystemExit(f"{name} was not run yet; give --python")
            with tempfile.TemporaryDirectory() as folder:
                self._done[name] = self._run(model, *ROWS[row], seed, Path(folder))
            self._path.write_text(json.dumps({"runs": self._done}, indent=1) + "\n")
        return self._done[name]

    def _run(self, model: str, fields: Fields | None, head: str | None, seed: int, folder: Path) -> Any:
        assert self._python is not None
        checkpoint = sparsessm.load(model)
        if model not in self._dense:
            windows = evaluation_windows("stdlib", checkpoint.tokenizer, length=LENGTH, limit=WINDOWS)[0]
            self._dense[model] = windows, perplexity(logits(checkpoint, windows), windows)
        windows, dense = self._dense[model]
        source: Any = model
        if fields is not None:
            source = folder / "pruned"
            ignore = ["dt_proj"] if model == "builtin:pycode" else []
            how = {
                "grid": "q4_0",
                "ignore": ignore,
                "samples": SAMPLES,
                "length": LENGTH,
                "seed": seed,
                **fields,
            }
            report = sparsessm.Run(checkpoint, Recipe(compute="float32", **how)).prune(measure=False)
            sparsessm.save(checkpoint, source, report)
        file, whole = folder / "model.gguf", folder / "whole.gguf"
        export(source, whole, type="f32")
        if head == "llama-quantize":
            subprocess.run(
                [self._python, "-c", QUANTIZE, str(whole), str(file)], check=True, capture_output=True
            )
        else:
            export(source, file, type="q4_0", head=head)
        before = {name: value.detach().clone() for name, value in checkpoint.model.named_parameters()}
        as_in(file, checkpoint.model)
        changed = {
            name: float((value.detach() - before[name]).abs().max() / before[name].abs().max())
            for name, value in checkpoint.model.named_parameters()
            if not torch.equal(before[name], value)
        }
        ours, ids = logits(checkpoint, windows), windows.tolist()
        found = computed(self._python, file, ids)[0]
        facts = {
            "dense": dense,
            "as pruned": perplexity(ours, windows),
            "in llama.cpp": perplexity(found, windows),
            **compared(found.flatten(0, 1), ours.flatten(0, 1)),
            "bytes": file.stat().st_size,
            "changed": changed,
            "cpu": cpu(),
        }
        if fields is not None:
            checkpoint.model.load_state_dict(before, strict=False)
            with torch.inference_mode():
                stock = checkpoint.model(windows[:2]).logits.flatten(0, 1)
            facts["f32"] = compared(computed(self._python, whole, ids[:2])[0].flatten(0, 1), stock)
        return facts


def spread(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def show(model: str, measure: Measure) -> None:
    print(f"| {model} | MB | as pruned | in llama.cpp | logits, KL, same token |\n|---|---|---|---|---|")
    for row, (fields, head) in ROWS.items():
        if (model, head) in REFUSED:
            continue
        runs = [measure(model, row, seed) for seed in (SEEDS if fields is not None else SEEDS[:1])]
        here, there = (
            spread([100 * (run[kind] / run["dense"] - 1) for run in runs], "+.2f")
            for kind in ("as pruned", "in llama.cpp")
        )
        far = [max(run["difference"] for run in runs), statistics.mean(run["kl"] for run in runs)]
        same = statistics.mean(run["same"] for run in runs)
        far_off = f"{far[0]:.1e}, {far[1]:.1e}, {same:.1%}"
        print(f"| {row} | {runs[0]['bytes'] / 1e6:.2f} | {here} | {there} | {far_off} |", flush=True)
    pruned = [
        measure(model, row, seed) for row, (fields, _) in ROWS.items() if fields is not None for seed in SEEDS
    ]
    far = [max(run["f32"][what] for run in pruned) for what in ("difference", "kl")]
    print(f"\nPruned, exported as f32: logits {far[0]:.1e}, KL {far[1]:.1e} at most.")
    print("Tensors that a file changes, and the largest change as a share of the tensor's largest value:")
    for row, (_, head) in ROWS.items():
        if (model, head) not in REFUSED:
            changed = measure(model, row, 0)["changed"]
            print(f"  {row}: {len(changed)}, {max(changed.values(), default=0):.1e}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="of an environment with cyllama, for what was not run yet")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gguf_q4_0.json")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    measure = Measure(options.json, options.again, options.python)
    for model in options.model or MODELS:
        show(model, measure)


if __name__ == "__main__":
    main()
