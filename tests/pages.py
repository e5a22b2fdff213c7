"""What tests of the page share: a record and measurements around one text, and the page read again."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import records

from sparsessm.report.page.document import page
from sparsessm.report.page.measured import Measured

# One text for each way to get out of a place where text belongs.
HOSTILE = (
    "</title></style></script><script>alert(1)</script><img src=//x.test onerror=alert(1)>\"' onload='x' "
    "--> ]]> &lt;b&gt; ${7*7} {{7*7}} javascript:alert(1) https://x.test/a //x.test \x00\x1b[31m "
    "\u202e \u2066 \ud800 \udfff \ufffe \U0001fffe $x^2$ `code` \u2028 end"
)
FIT: dict[str, Any] = {
    "points": [
        {"bits": 2.25, "bytes": 1.46e6, "increase": 0.0872, "low": 0.08, "high": 0.095},
        {"bits": 3.25, "bytes": 1.96e6, "increase": 0.0143, "low": 0.012, "high": 0.017},
        {"bits": 6, "bytes": 3.35e6, "increase": -0.0004, "low": -0.001, "high": 0.001},
    ],
    "chosen": 3.25,
}


def record(text: str) -> dict[str, Any]:
    """Of a run whose every name is `text`."""
    rows = [
        records.matrix("in_proj", layer, error=0.1 * (layer + 1), signal=9.0, bits=300 + layer)
        for layer in range(3)
    ]
    named = f"backbone.{text}.weight"
    rows.append(
        records.row(1, target=named, error=1.0, signal=4.0, bits=500, family="projections", removed="zero")
    )
    made = records.report(*rows).record()
    made["recipe"] |= {"model": text, "data": text, "rules": [{"targets": [text]}]}
    made["machine"] = {"cpu": text, "threads": 2}
    made["versions"] = {"sparsessm": text}
    made["totals"][text] = made["totals"]["projections"]
    return made


def measured(text: str) -> Measured:
    """Of two models, whose every name and text is `text`."""
    model = {
        "model": text,
        "bytes": {"resident": 5, "read_per_step": 5},
        "tokens_per_second": {"decode": {"1": {"median": 100.0, "low": 90.0, "high": 110.0}}},
    }
    perplexity = {"data": text, "windows": 9, "length": 8, "bits_per_byte": 1.0, "perplexity": 9.0}
    return Measured(
        weights=text,
        against=text,
        day=text,
        perplexity={
            "dense": perplexity,
            "pruned": {**perplexity, "perplexity": 10.0, "low": 9.5, "high": 10.5},
            "difference": {"mean": 0.0143, "low": 0.01, "high": 0.02},
        },
        divergence={
            "mean": 0.02, "low": 0.01, "high": 0.03, "median": 0.01, "p99": 0.2, "most": 3.0, "same": 0.93,
            "tokens": 60, "edges": [0.0, 0.001, 0.01, 0.1], "counts": [10, 20, 25, 5],
        },
        windows=[
            {
                "index": 4, "lost": 0.5, "before": 2.0, "after": 2.5, "start": 1,
                "tokens": [[text, 0.7], [text, 0.0], ["plain\n", 5.0]], "worst": [[text, 1.0, 6.0]],
            }
        ],
        sizes={"result": {"weights": 334, "all": 500}, "dense": {"weights": 1000, "all": 1200}},
        speed={
            "models": [model, model],
            "ratios": {"decode": {"1": {"median": 1.7, "low": 1.6, "high": 1.8}}},
            "prompt_tokens": 512, "threads": 2, "notes": [text],
        },
        tasks={
            "title": text, "columns": [text, "acc"], "cells": [[text, "12.0"]], "words": 1, "notes": [text],
        },
        machine={"cpu": text},
        missing=[text],
    )  # fmt: skip


def whole(text: str) -> str:
    """The page with all of its sections around one text."""
    fit = {**FIT, "asked": text, "refused": [text], "why": text}
    fit["points"] = [{**point, "note": text} for point in FIT["points"]]
    return page(record(text), measured(text), directory=text, fit=fit)


class Reader(HTMLParser):
    """What a browser would see.

    Attributes:
        elements: (name, attributes) in their order. text: of all but style and script. sources: of those two.
        comments: there should be none.
    """

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.sources, self.comments = "", dict[str, str](), list[str]()
        self._inside: list[str] = []
        self.feed(content)
        self.close()
        assert not self._inside, self._inside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in ("meta", "br", "hr"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("style", "script"):
            self.sources[self._inside[-1]] = data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all_of(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a name."""
        return [attributes for tag, attributes in self.elements if tag == name]
