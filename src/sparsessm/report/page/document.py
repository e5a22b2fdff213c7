"""The whole page: what is known of a result, as one HTML file without a request to anywhere.

Place in the flow: the top of this folder. It takes plain values and returns text; it measures nothing,
reads nothing but its own style and script, and writes nothing. Its policy (`Content-Security-Policy`) lets a
browser run these two alone, by their SHA-256, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ...data.texts import DATASETS
from . import costs, places, repeating
from .asked import asked, done
from .markup import Content, Safe, document, plain, raw, tag
from .measured import Measured
from .parts import key_figure, listed
from .pictures import refuse_without_matplotlib
from .words import at, between, change, figure, headline, number_at, percent, size, table_at

MARK = "sparsessm report"
"""How a page of ours names what made it, within its first kilobyte."""


def page(
    record: Mapping[str, Any],
    measured: Measured,
    *,
    directory: str,
    fit: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        record: of the result, as `record.checked` lets it through; fields may be missing.
        measured: what was measured; a field that is empty is not shown.
        directory: the result, as the user named it.
        fit: where a search chose the size: "asked" (a sentence), "points" (each "bits", "bytes", "increase",
            "low", "high", "note"), "chosen" (bits of the one kept), "refused" and "why" (sentences),
            "held_out" (SHA-256 of windows that are known to be no calibration text). See `searched.py`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    refuse_without_matplotlib()
    perplexity = measured.perplexity or table_at(record, "perplexity")
    difference = table_at(perplexity, "difference")
    sentence = headline(measured.sizes, difference, costs.speed_ratio(measured))
    name = _name(record, directory)
    body: list[Content] = [
        tag("a", "Skip to the figures", href="#main", class_="skip"),
        tag(
            "header",
            tag("p", MARK, class_="eyebrow"),
            tag("h1", name),
            tag("p", f"{sentence}.", class_="headline"),
        ),
    ]
    parts = [
        tag("dl", *_keys(record, measured, perplexity), class_="keys"),
        _summary(record, perplexity, fit),
        costs.cost(perplexity, measured),
        costs.bytes_and_speed(measured),
        costs.frontier(fit),
        places.by_layer(record),
        places.suffering(measured),
        repeating.untested(record, measured, perplexity),
        repeating.repeat(record, measured, directory),
    ]
    made = at(record, "versions", "sparsessm")
    by = f"Made by sparsessm{f' {made}' if isinstance(made, str) else ''}. It loads nothing from anywhere."
    body += [tag("main", *parts, id="main"), tag("footer", tag("p", by))]
    style, script = _source("page.css"), _source("page.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="generator", content=MARK),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: {sentence}"),
        raw("style", style),
    ]
    return document(head, [*map(_safe, body), raw("script", script)])


def is_page(beginning: bytes) -> bool:
    """Whether the first kilobyte of a file is that of a page of ours."""
    return beginning.startswith(b"<!doctype html>") and MARK.encode() in beginning


def _safe(part: Content) -> Safe:
    assert isinstance(part, Safe)
    return part


def _source(name: str) -> str:
    return files("sparsessm.report.page").joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _name(record: Mapping[str, Any], directory: str) -> str:
    model = at(record, "recipe", "model")
    known = model if isinstance(model, str) and model else directory
    last = re.split(r"[/:\\]", plain(known).rstrip("/\\"))[-1] or known
    return f"{last}, compressed"


def _keys(record: Mapping[str, Any], measured: Measured, perplexity: Mapping[str, Any]) -> list[Safe]:
    found = []
    ours, dense = (number_at(measured.sizes, name, "weights") for name in ("result", "dense"))
    if ours is not None:
        below = f"{percent(ours / dense, '.0f')} of {size(dense)}" if dense else "dense: unknown"
        found.append(key_figure("Weights on disk", size(ours), below))
    difference = table_at(perplexity, "difference")
    if number_at(difference, "mean") is not None:
        ends = between(difference.get("low"), difference.get("high"))
        below = f"95 %: {ends}" if ends else "one window: no interval"
        found.append(key_figure("Perplexity", change(difference["mean"]), below))
    if speed := costs.speed_key(measured):
        found.append(key_figure("Speed", *speed))
    if (same := number_at(measured.divergence, "same")) is not None:
        found.append(key_figure("Same next token", percent(same), "of tokens, the likeliest one"))
    bits = [
        (number_at(total, "bits"), number_at(total, "entries"))
        for total in table_at(record, "totals").values()
    ]
    known = [(b, n) for b, n in bits if b is not None and n]
    if known and len(known) == len(bits):
        mean = sum(b * n for b, n in known) / sum(n for _, n in known)
        found.append(key_figure("Bits a weight", figure(mean, ".2f"), "of the compressed matrices"))
    return found


def _summary(record: Mapping[str, Any], perplexity: Mapping[str, Any], fit: Mapping[str, Any] | None) -> Safe:
    data = at(perplexity, "pruned", "data")
    caveat = None
    held_out, windows = at(fit, "held_out"), at(perplexity, "pruned", "fingerprint")
    apart = isinstance(held_out, list) and isinstance(windows, str) and windows in held_out
    calibrated = at(record, "calibration", "sha256") and data == at(record, "recipe", "data")
    if calibrated and isinstance(data, str) and data not in DATASETS and not apart:
        caveat = tag(
            "p",
            f"{data} has no held-out part: perplexity was measured on the text of the calibration, so the "
            "model may look better than it is.",
            class_="caveat",
        )
    return tag(
        "section",
        tag("h2", "What was asked and done", id="asked-heading"),
        tag("p", tag("strong", "Asked: "), asked(record, fit)),
        tag("p", tag("strong", "Done:")),
        listed(done(record)),
        caveat,
        aria_labelledby="asked-heading",
        id="asked",
    )
