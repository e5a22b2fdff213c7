"""Damage against stored bits: `python bench/bits.py` rounds the built-in models in every way that the docs
compare, and writes bench/results/bits.json.

Linear layers only. Change of held-out perplexity in % against the dense model (32 windows of 512 tokens of
modules that no calibration sees); 32 calibration windows of 512 tokens, seeds 0, 1 and 2; mean, and in
brackets least and greatest of the seeds. Bits are all that is stored of these matrices: codes, masks, scales.
Every run is kept in the file and not repeated; `--again` forgets them.
Options: --model NAME (both by default), --row NAME (all by default), --json FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kquants
import torch
from bench import cpu

import sparsessm
from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Forgetful
from sparsessm.data.texts import evaluation_windows, fingerprint
from sparsessm.evaluation.perplexity import Perplexity, perplexity
from sparsessm.recipe.recipe import Recipe

MODELS = ("builtin:pycode", "builtin:pycode2")
SEEDS = (0, 1, 2)
SAMPLES, WINDOWS, LENGTH = 32, 32, 512
Fields = dict[str, Any]
WIDTHS = (4, 3, 2)

ROWS: dict[str, Fields] = {
    **{f"rtn, {b} bits": {"method": "rtn", "grid": f"int{b}"} for b in WIDTHS},
    **{f"gptq, {b} bits": {"method": "gptq", "grid": f"int{b}"} for b in WIDTHS},
    **{
        f"gptq + dense-target, {b} bits": {"method": "gptq", "grid": f"int{b}", "repair": "dense-target"}
        for b in WIDTHS
    },
    **{f"absorb, {b} bits": {"grid": f"int{b}"} for b in WIDTHS},
    "sparsegpt, 50 % and 4 bits": {"method": "sparsegpt", "grid": "int4", "sparsity": 0.5},
    "absorb, 50 %": {"sparsity": 0.5},
    **{f"absorb, 50 % and {b} bits": {"grid": f"int{b}", "sparsity": 0.5} for b in (4, 3)},
    **{f"absorb, 2:4 and {b} bits": {"grid": f"int{b}", "pattern": "2:4"} for b in (8, 4)},
    **{f"llama.cpp {kind}": {"format": kind} for kind in ("Q4_0", "Q3_K", "Q2_K")},
    **{f"one dial, {bits:g} bits": {"bits": bits} for bits in (4.25, 3.25, 2.75, 2.25)},
}


class Remembering:
    """A journal: what does not depend on the row is found once for a model and a seed, prices and curves."""

    def __init__(self, architecture: Architecture, kept: dict[str, Any], dial: bool) -> None:
        self._rest = Forgetful(architecture)
        self._kept, self._dial = kept, dial
        self.begin, self.start, self.stage = self._rest.begin, self._rest.start, self._rest.stage

    @property
    def seconds(self) -> float:
        return self._rest.seconds

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if not (name.startswith("prices") or (self._dial and name == "shares")):
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class Measure:
    """Runs recipes on the built-in models, each once."""

    def __init__(self, path: Path, again: bool) -> None:
        self._path = path
        self._done: dict[str, Any] = {}
        if path.exists() and not again:
            self._done = json.loads(path.read_text())["runs"]
        self._text: dict[str, Any] = {}
        self._kept: dict[tuple[str, int], dict[str, Any]] = {}

    def __call__(self, model: str, fields: Fields, seed: int) -> dict[str, Any]:
        """What a run made of the model."""
        name = json.dumps({"model": model, "seed": seed, **fields}, sort_keys=True)
        if name not in self._done:
            self._done[name] = self._run(model, fields, seed)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"runs": self._done}, indent=1) + "\n")
        return dict(self._done[name])

    def _run(self, model: str, fields: Fields, seed: int) -> dict[str, Any]:
        checkpoint = sparsessm.load(model)
        if model not in self._text:
            text = evaluation_windows("stdlib", checkpoint.tokenizer, length=LENGTH, limit=WINDOWS)
            self._text[model] = text, perplexity(checkpoint.model, *text)
        text, dense = self._text[model]
        if "format" in fields:
            return self._formatted(checkpoint, fields["format"], text, dense)
        recipe = Recipe(
            target="projections", compute="float32", samples=SAMPLES, length=LENGTH, seed=seed, **fields
        )
        run = sparsessm.Run(checkpoint, recipe)
        tokens = run.windows()
        kept = self._kept.setdefault((model, seed), {})
        began = time.perf_counter()
        report = run.plan.run(
            run.architecture, tokens, journal=Remembering(run.architecture, kept, "bits" in fields)
        )
        seconds = time.perf_counter() - began
        return self._told(dense, perplexity(checkpoint.model, *text), report, seconds, tokens)

    @staticmethod
    def _formatted(checkpoint: Any, kind: str, text: Any, dense: Perplexity) -> dict[str, Any]:
        """The linear layers in a format of llama.cpp (kquants.py), which looks at no data."""
        stored = entries = 0.0
        for target in checkpoint.architecture().targets:
            if target.family == "projections":
                values, bits = kquants.stored(target.matrix.clone(), kind)
                target.replace_exactly(values)
                stored, entries = stored + bits * values.numel(), entries + values.numel()
        now = perplexity(checkpoint.model, *text)
        facts = {"change": now.perplexity / dense.perplexity - 1, "bits": stored / entries, "zeros": 0.0}
        return {**facts, "entropy": None, "windows": {"held_out": now.fingerprint}, "cpu": cpu()}

    @staticmethod
    def _told(dense: Perplexity, now: Perplexity, report: Any, seconds: float, tokens: Any) -> dict[str, Any]:
        (total,) = report.totals.values()
        kept = total["entries"] - total["pruned"]
        bits = total["bits"] or 1 + 16 * kept / total["entries"]  # a bitmap and what it keeps in bfloat16
        entropies = [row.entropy for row in report.rows if row.entropy is not None]
        steps = [row.step for row in report.rows if row.step is not None]
        return {
            "change": now.perplexity / dense.perplexity - 1,
            "perplexity": now.perplexity,
            "dense": dense.perplexity,
            "bits": bits,
            "entropy": sum(entropies) / total["entries"] if entropies else None,
            "zeros": total["sparsity"],
            "steps": [min(steps), max(steps)] if steps else None,
            "seconds": round(seconds, 1),
            "windows": {
                "calibration": None if tokens is None else fingerprint(tokens),
                "held_out": now.fingerprint,
            },
            "cpu": cpu(),
            "threads": torch.get_num_threads(),
        }


def show(model: str, rows: list[str], measure: Measure) -> None:
    lines = [f"| {model} | bits | entropy | zeros | perplexity, change in % |", "|---|---|---|---|---|"]
    for row in rows:
        runs = [measure(model, ROWS[row], seed) for seed in SEEDS]
        changes = [100 * run["change"] for run in runs]
        bits, zeros = (statistics.mean(run[name] for run in runs) for name in ("bits", "zeros"))
        entropy = "" if runs[0]["entropy"] is None else f"{statistics.mean(r['entropy'] for r in runs):.2f}"
        text = f"{statistics.mean(changes):+.2f} ({min(changes):+.2f} to {max(changes):+.2f})"
        lines.append(f"| {row} | {bits:.2f} | {entropy} | {100 * zeros:.0f} % | {text} |")
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--row", choices=list(ROWS), action="append")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "bits.json")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    measure = Measure(options.json, options.again)
    for model in options.model or MODELS:
        show(model, options.row or list(ROWS), measure)


if __name__ == "__main__":
    main()
