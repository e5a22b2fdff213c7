"""What pruning costs: `python bench/quality.py` prunes the built-in models in every way the README and docs
compare.

Held-out perplexity against the dense model, on modules that no calibration sees; calibration seeds 0, 1 and
2; mean and (in brackets) least and greatest of the seeds. Every run is kept in a JSON file and not repeated;
it says on which processor and which text it was made, as every Python has another standard library.
Options: --table NAME (all by default), --samples W, --windows W held-out windows, --json FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench import cpu

import sparsessm
from sparsessm.data.edition import edition
from sparsessm.data.texts import evaluation_windows, fingerprint
from sparsessm.evaluation.perplexity import difference, perplexity
from sparsessm.recipe.recipe import Recipe

MODEL, MODEL2 = "builtin:pycode", "builtin:pycode2"
SEEDS = (0, 1, 2)
Fields = dict[str, Any]

DENSITIES: dict[str, Fields] = {
    **{f"{percent} %": {"sparsity": percent / 100} for percent in (30, 50, 60, 70)},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
LINEAR: Fields = {"target": "projections"}


def units(axis: str, *shares: int, **more: Any) -> dict[str, Fields]:
    """Columns: so many percent of an axis."""
    return {
        f"{share} %": {"pattern": f"structured:{axis}", "sparsity": share / 100, **more} for share in shares
    }


def beside_exact(method: str) -> Fields:
    """The linear layers by this method, A_log by the same one in all rows."""
    return {
        "rules": [
            {"targets": ["projections"], "method": method},
            {"targets": ["ssm"], "pattern": "unstructured"},
        ]
    }


# Of the states alone: who chooses, whether those that stay become mixtures of all, and whether the matrices
# are fitted too.
CHOSEN: dict[str, Fields] = {
    "random": {"method": "random", "repair": "none"},
    "column vote (SparseSSM's)": {"method": "sparsessm-vote", "repair": "none"},
    "GHOST": {"method": "ghost", "repair": "none"},
    "exact": {"method": "exact", "repair": "none"},
    "column vote, mixed": {"method": "sparsessm-vote"},
    "GHOST, mixed": {"method": "ghost"},
    "exact, mixed, matrices refitted": {"repair": "dense-target"},
    "exact, mixed (default)": {},
}
# Mamba-2's cannot be mixed in a stock checkpoint.
CHOSEN2: dict[str, Fields] = {name: CHOSEN[name] for name in ("random", "GHOST")}
CHOSEN2 |= {
    "exact, matrices refitted": {"repair": "dense-target"},
    "exact (default)": {},
    "balanced (our runtime only)": {"method": "balanced"},
}
WHOLE: dict[str, Fields] = {"magnitude": {"method": "magnitude", "repair": "none"}}
WHOLE |= {"exact": {"repair": "none"}, "exact, repaired (default)": {}}
BY_LAYER: dict[str, Fields] = {"exact, repaired, by layer (our runtime only)": {"allocation": "loss"}}
BLOCKS: dict[str, Fields] = {"cosine": {"method": "cosine", "repair": "none"}}
BLOCKS |= {"exact": {"repair": "none"}, "exact, repaired (default)": {}}
MIXES: dict[str, Fields] = {
    f"{share} % of all parameters": {"pattern": "structured", "sparsity": share / 100} for share in (25, 50)
}
# Models with attention and MLPs, each with its kinds of layers: what a method does to one, the others dense.
BOTH = {"attention": "re:.*self_attn.*"}
HYBRIDS: dict[str, tuple[str, dict[str, str]]] = {
    "delta rule": (
        "builtin:pydelta",
        {"delta rule": "re:.*linear_attn.*", **BOTH, "MLP": "re:.*[.]mlp[.].*"},
    ),
    "hybrid": (
        "builtin:pyhybrid",
        {
            **{"Mamba-2": "re:.*[.]mamba[.].*", **BOTH, "MLP": "re:.*shared_mlp.*"},
            "experts": "re:.*block_sparse_moe.*",
        },
    ),
}


def hybrid_tables(name: str) -> dict[str, tuple[dict[str, Fields], dict[str, Fields], str]]:
    """Of one of `HYBRIDS`."""
    model, kinds = HYBRIDS[name]
    shares = {share: DENSITIES[share] for share in ("50 %", "70 %")}
    methods = {method: {"method": method} for method in ("magnitude", "wanda", "sparsegpt")}
    decays = {"exact (default)": {"target": "ssm"}, "sparsessm": {"target": "ssm", "method": "sparsessm"}}
    grids = {method: {**LINEAR, "method": method, "sparsity": 0} for method in ("rtn", "gptq")}
    found: dict[str, tuple[dict[str, Fields], dict[str, Fields], str]] = {
        f"methods of the {name}": (methods | {"absorb (default)": {}}, shares, model),
        f"patterns of the {name}": (methods | {"absorb (default)": {}}, {"2:4": DENSITIES["2:4"]}, model),
        f"decays of the {name}": (decays, {share: DENSITIES[share] for share in ("30 %", "50 %")}, model),
        f"bits of the {name}": ({"one dial": LINEAR}, STORED, model),
        f"grids of the {name}": (
            grids, {f"{width}.25": {"grid": f"int{width}:64"} for width in (4, 3, 2)}, model
        ),
    }  # fmt: skip
    for where in kinds:
        alone = {**LINEAR, "ignore": [other for kind, other in kinds.items() if kind != where]}
        rows = {"sparsegpt": {**alone, "method": "sparsegpt"}, "absorb": alone}
        found[f"parts of the {name}, {where}"] = rows, {"50 %": DENSITIES["50 %"]}, model
    return found


STORED: dict[str, Fields] = {"4.25": {"bits": 4.25}, "3.25": {"bits": 3.25}, "2.25": {"bits": 2.25}}

# Rows (a label and what it adds to the recipe) and columns of each table, and its model.
TABLES: dict[str, tuple[dict[str, Fields], dict[str, Fields], str]] = {
    "methods": (
        {
            "magnitude": beside_exact("magnitude"),
            "wanda": {"method": "wanda"},
            "sparsegpt": {"method": "sparsegpt"},
            "absorb (default)": {},
        },
        DENSITIES,
        MODEL,
    ),
    "state matrix alone": (
        {"exact (default)": {"target": "ssm"}},
        {"50 %": {"sparsity": 0.5}},
        MODEL,
    ),
    "absorption": (
        {
            "sparsegpt": {**LINEAR, "method": "sparsegpt"},
            "sparsegpt + dense-target": {**LINEAR, "method": "sparsegpt", "repair": "dense-target"},
        },
        {name: DENSITIES[name] for name in ("50 %", "60 %", "70 %", "2:4")},
        MODEL,
    ),
    "steps": (
        {
            "sparsegpt": {**LINEAR, "method": "sparsegpt"},
            "+ dense-target": {**LINEAR, "method": "sparsegpt", "repair": "dense-target"},
            "+ fisher": {**LINEAR, "method": "sparsegpt", "repair": "dense-target", "price": "fisher"},
            "+ refit, 32 columns": {**LINEAR, "allocation": "uniform"},
            "+ loss (absorb)": LINEAR,
        },
        {name: DENSITIES[name] for name in ("50 %", "70 %")},
        MODEL,
    ),
    "allocation": (
        {name: {**LINEAR, "allocation": name} for name in ("uniform", "hessian-trace", "owl", "loss")},
        {name: DENSITIES[name] for name in ("50 %", "70 %")},
        MODEL,
    ),
    "states": (CHOSEN, units("state", 25, 50, 75), MODEL),
    "states of Mamba-2": (CHOSEN2, units("state", 25, 50, 75), MODEL2),
    "channels": (WHOLE | BY_LAYER, units("channel", 25, 50), MODEL),
    "heads of Mamba-2": (WHOLE, units("head", 50), MODEL2),
    "channels of Mamba-2's heads": (WHOLE, units("channel", 50), MODEL2),
    "blocks": (BLOCKS, units("block", 14, 29), MODEL),
    "blocks of Mamba-2": (BLOCKS, units("block", 14, 29), MODEL2),
    "mix": ({"exact, repaired (default)": {}}, MIXES, MODEL),
    **{title: table for name in HYBRIDS for title, table in hybrid_tables(name).items()},
    "mix of Mamba-2": ({"exact, repaired (default)": {}}, MIXES, MODEL2),
}  # fmt: skip


def key(fields: Fields, seed: int, samples: int, windows: int, model: str) -> str:
    told = {**fields, "seed": seed, "samples": samples, "windows": windows}
    return json.dumps(told if model == MODEL else {**told, "model": model}, sort_keys=True)


class Measure:
    """Runs recipes on a built-in model, each once."""

    def __init__(self, path: Path, samples: int, windows: int, model: str = MODEL) -> None:
        self._path, self._samples, self._windows, self._model = path, samples, windows, model
        self._done: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
        self._tokens: dict[int, torch.Tensor] = {}
        self._dense: Any = None
        self._where: dict[str, Any] = {}

    def __call__(self, fields: Fields, seed: int) -> float:
        """Relative change of perplexity."""
        name = key(fields, seed, self._samples, self._windows, self._model)
        if name not in self._done:
            self._done[name] = self._run(fields, seed)
            record = {"runs": self._done}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(record, indent=1) + "\n")
        return float(self._done[name]["change"])

    def _run(self, fields: Fields, seed: int) -> dict[str, Any]:
        checkpoint = sparsessm.load(self._model)
        if self._dense is None:
            length = checkpoint.trained_length
            self._text = evaluation_windows(
                "stdlib", checkpoint.tokenizer, length=length, limit=self._windows
            )
            self._dense = perplexity(checkpoint.model, *self._text, data="stdlib")
            splits = {
                "calibration": edition("stdlib", "calibration"),
                "held_out": self._dense.record()["text"],
            }
            self._where = {"cpu": cpu(), "threads": torch.get_num_threads(), "text": splits}
        run = sparsessm.Run(
            checkpoint, Recipe(**{"compute": "float32"} | fields, samples=self._samples, seed=seed)
        )
        if seed not in self._tokens:
            same = Recipe(samples=self._samples, seed=seed, length=run.recipe.length)
            drawn = sparsessm.Run(checkpoint, same).windows()
            assert drawn is not None
            self._tokens[seed] = drawn
        began = time.perf_counter()
        report = run.prune(self._tokens[seed], measure=False)
        seconds = time.perf_counter() - began
        pruned = perplexity(checkpoint.model, *self._text)
        change = difference(self._dense, pruned)
        print(f"  {fields} seed {seed}: {100 * change.mean:+.2f} % in {seconds:.0f} s", flush=True)
        sparsity = {family: total["sparsity"] for family, total in report.totals.items()}
        return {
            "perplexity": pruned.perplexity, "dense": self._dense.perplexity, "change": change.mean,
            "low": change.low, "high": change.high, "seconds": round(seconds, 1), "sparsity": sparsity,
            "parameters": report.parameters, "shape": report.shape,
            "windows": {"calibration": fingerprint(self._tokens[seed]), "held_out": pruned.fingerprint},
            **self._where,
        }  # fmt: skip


def show(title: str, rows: dict[str, Fields], columns: dict[str, Fields], measure: Measure) -> None:
    head = f"| {title}: change of perplexity in % | {' | '.join(columns)} |"
    lines = [head, "|---|" + "---|" * len(columns)]
    changes = {
        row: {name: [100 * measure(more | fields, seed) for seed in SEEDS] for name, more in columns.items()}
        for row, fields in rows.items()
    }
    for row, cells in changes.items():
        texts = [
            f"{statistics.mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"
            if len(set(values)) > 1 else f"{values[0]:+.2f}"
            for values in cells.values()
        ]  # fmt: skip
        lines.append(f"| {row} | {' | '.join(texts)} |")
    last, base = list(rows)[-1], "sparsegpt"
    if base in rows and last != base:
        ratios = [
            statistics.mean(changes[last][name]) / statistics.mean(changes[base][name]) for name in columns
        ]
        cells = " | ".join(f"{ratio:.2f}" if math.isfinite(ratio) else "-" for ratio in ratios)
        lines.append(f"| {last} / {base} | {cells} |")
    print("\n" + "\n".join(lines) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=list(TABLES), action="append")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("build/quality.json"))
    options = parser.parse_args()
    for title in options.table or TABLES:
        rows, columns, model = TABLES[title]
        show(title, rows, columns, Measure(options.json, options.samples, options.windows, model))


if __name__ == "__main__":
    main()
