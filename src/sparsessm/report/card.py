"""The model card (README.md) of a result: Markdown for people and for a hub.

Place in the flow: after the report; `sparsessm.save` has `checkpoint` write it beside the record.
"""

from __future__ import annotations

import re

from ..data.inert import visible
from .machine import installed
from .record import REMOVED_WORDS, Report, kind_of, perplexity_table, recipe_table, removed_table


def card(report: Report, source: str, *, base_model: str | None = None, format: str = "transformers") -> str:
    """The card, with a YAML front matter.

    Args:
        report: of the run.
        source: where the dense model came from, as the user wrote it.
        base_model: its hub id; None for a model that is not on a hub.
        format: "transformers", "state-spaces" or "packed", how the result is stored.
    """
    front = [
        "---",
        *(["library_name: transformers"] if format == "transformers" else []),
        "pipeline_tag: text-generation",
        *([f"base_model: {base_model}"] if base_model else []),
        "tags:",
        *(f"- {tag}" for tag in ("mamba", "pruning", "sparse", "sparsessm")),
        "---",
    ]
    _, fields = recipe_table(report.recipe)
    same = "model" if report.parameters else "masks"
    repeat = (
        f"The recipe is in pruning.json. On the same machine with the same number of threads "
        f"({report.machine['threads']}), the same recipe gives the same {same}: "
        "`sparsessm prune --recipe pruning.json -o DIR`."
    )
    if report.pruned_before:
        repeat = "The model had been pruned before, in memory. This page describes the last run only."
    text = "\n".join(
        [
            *front,
            "",
            f"# {_name(source)}, pruned",
            "",
            f"sparsessm {installed('sparsessm')} pruned `{source}` in one shot, without training.",
            "",
            "## What was removed",
            "",
            *_removed(report),
            "",
            "## How it was made",
            "",
            *_markdown(["option", "value"], [[name, f"`{value}`"] for name, value in fields]),
            "",
            f"SHA-256 of the calibration tokens: `{report.fingerprint or 'none were needed'}`.",
            repeat,
            "",
            "## What it cost",
            "",
            *_cost(report),
            "",
            "## How to load it",
            "",
            _LOADING[format],
            "",
            "## Size and speed",
            "",
            report.honesty(),
            "",
        ]
    )
    return visible(text, allowed="\n")  # names of tensors and files are in it


def _removed(report: Report) -> list[str]:
    record = report.record()
    lines = _markdown(*removed_table(record["targets"], record["totals"]))
    if report.parameters:
        removed = report.rows[0].removed
        return [*lines, "", f"What happened to a removed unit: {REMOVED_WORDS[removed]}."]
    lines += ["", _COLUMNS]
    for removed in dict.fromkeys(row.removed for row in report.rows):
        kinds = dict.fromkeys(f"`{kind_of(row.target)}`" for row in report.rows if row.removed == removed)
        what = f"A removed entry of {', '.join(kinds)} becomes `{removed}`: {REMOVED_WORDS[removed]}."
        lines += ["", what]
    if repaired := dict.fromkeys(kind_of(name) for row in report.rows for name in row.repaired):
        names = ", ".join(f"`{kind}`" for kind in repaired)
        lines += ["", f"Also changed in these layers, to repair the error: {names}."]
    return [*lines, *(["", report.damped()] if report.damped() else [])]


def _cost(report: Report) -> list[str]:
    records = {name: report.perplexity[name] for name in ("dense", "pruned") if name in report.perplexity}
    if not records:
        return ["Perplexity was not measured."]
    changes = {
        name: report.perplexity["difference"] for name in ("pruned",) if "difference" in report.perplexity
    }
    columns, cells = perplexity_table(records, changes)
    first = next(iter(records.values()))
    text = f"Measured on {first['windows']} windows of {first['length']} tokens of `{first['data']}`. "
    paired = "The change is measured on the same windows; the brackets hold its 95 % interval."
    lines = [*_markdown(columns, cells), "", text + paired]
    return [*lines, *([report.caveat()] if report.caveat() else [])]


def _markdown(columns: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _name(source: str) -> str:
    return re.split(r"[/:\\]", source.rstrip("/\\"))[-1] or source


_COLUMNS = (
    "`range`: the lowest and highest sparsity of one tensor. `relative error`: energy of the output error, "
    "divided by energy of the output; mean over the tensors."
)
_LOADING = {
    "transformers": """\
No special code is needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```""",
    "state-spaces": """\
It has the format of original state-spaces checkpoints:

```python
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("path/to/this/directory")
```

Without a GPU, `sparsessm.load("path/to/this/directory").model` is a transformers model.""",
    "packed": """\
It is a packed directory. Run it with sparsessm:

```python
import sparsessm

print(sparsessm.runtime.load("path/to/this/directory").generate("Once").text)
```

On the command line: `sparsessm generate path/to/this/directory "Once"`.""",
}
