"""Where it was compressed and where it hurts: layers and matrices, tokens and windows.

Place in the flow: between `parts.py` and the whole page. A section of which nothing is known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import layers, pictures
from .markup import Content, Safe, tag
from .measured import Measured
from .parts import Number, folded, picture, pictures_of, section, table
from .words import (
    bin_words,
    figure,
    number_at,
    percent,
    real,
    rows_at,
)

MARKED = (0.5, 1.0, 2.0, 4.0)  # nats that a token lost: where the next colour begins
MOST = 4000  # matrices
FOLDED = 24  # rows of a table that stays open


def by_layer(record: Mapping[str, Any]) -> Safe | None:
    """Sparsity, bits and error, layer by layer and matrix by matrix."""
    every = layers.cells(record)
    found = every[:MOST]
    if not found:
        return None
    what = "units" if layers.whole_units(record) else "weights"
    drawn = pictures_of(
        (
            pictures.heat("sparsity", "Sparsity by layer and matrix", found, "sparsity"),
            f"Share of {what} removed.",
        ),
        (
            pictures.heat("bits", "Bits a weight by layer and matrix", found, "bits"),
            "Bits stored a weight, masks and scales counted.",
        ),
        (
            pictures.lines("error", "Output error by layer", found),
            "Error of each matrix's output on the calibration text, as a share of the output's energy.",
        ),
    )
    columns = ["layer", "matrix", "removed"]
    of: list[tuple[str, str]] = []
    if any(cell.bits is not None for cell in found):
        of.append(("bits", ".2f"))
        columns.append("bits a weight")
    if any(cell.error is not None for cell in found):
        of.append(("error", ".2e"))
        columns.append("error / output")
    rows = [
        [
            Number(cell.place, cell.layer),
            cell.kind,
            Number(percent(cell.sparsity), cell.sparsity),
            *(Number(figure(getattr(cell, name), form), getattr(cell, name)) for name, form in of),
        ]
        for cell in found
    ]
    numbers = table("By layer and matrix", columns, rows, words=2)
    left = len(every) - len(found)
    return section(
        "layers",
        "Where it was compressed",
        drawn,
        tag("p", f"The last {left:,} matrices are not shown.") if left else None,
        numbers if len(rows) <= FOLDED else folded(f"All {len(rows)} matrices as a table", numbers),
    )


def suffering(measured: Measured) -> Safe | None:
    """The histogram of the KL, and the windows that lost most."""
    parts: list[Content] = []
    kl = measured.divergence
    edges, counts = (
        [real(x) for x in kl[name]] if isinstance(kl.get(name), list) else [] for name in ("edges", "counts")
    )
    lower, tokens = [x or 0.0 for x in edges], [x or 0.0 for x in counts]
    rising = all(low < high for low, high in zip([0.0, *lower[1:-1]], lower[1:], strict=False))
    fits = 1 < len(lower) < 100 and len(lower) == len(tokens) and lower[0] == 0 and rising
    if fits and all(0 <= count < 1e15 for count in tokens):
        total = sum(tokens) or 1.0
        drawn = pictures.histogram(
            "kl", "KL divergence over tokens", lower, tokens, number_at(kl, "mean") or 0.0
        )
        rows = [
            [
                Number(bin_words(lower, place), edge),
                Number(figure(count, ",.0f"), count),
                Number(percent(count / total), count),
            ]
            for place, (edge, count) in enumerate(zip(lower, tokens, strict=True))
        ]
        shares = (
            f"Half of the tokens are below {figure(kl.get('median'), '.2g')} nats, 99 % below "
            f"{figure(kl.get('p99'), '.2g')}; the largest is {figure(kl.get('most'), '.2g')}."
        )
        parts += [
            picture(drawn, f"How far the predictions moved, token by token. {shares}", alone=True),
            folded("The histogram as a table", table("Tokens by KL", ["nats", "tokens", "share"], rows)),
        ]
    windows = [
        _window(one, place)
        for place, one in enumerate(rows_at(measured.windows and {"": measured.windows}, ""), 1)
    ]
    if windows:
        intro = "The stretch of each that lost most. Marked are tokens that became less likely, by "
        scale = [tag("span", f"{limit:g}", class_=f"h{place}") for place, limit in enumerate(MARKED, 1)]
        scale = [part for one in scale for part in (one, ", ")][:-1] + [" nats and more."]
        parts += [tag("h3", "The windows that suffered most"), tag("p", intro, *scale), *windows]
    return section("suffering", "Where it hurts", *parts) if parts else None


def _window(one: Mapping[str, Any], place: int) -> Safe:
    lost, before, after = (number_at(one, word) for word in ("lost", "before", "after"))
    title = f"{place}. Window {figure(one.get('index'), '.0f')}: {figure(lost, '.3f')} nats a token lost"
    tokens = one.get("tokens")
    pairs = (
        [pair for pair in tokens if isinstance(pair, list) and len(pair) == 2]
        if isinstance(tokens, list)
        else []
    )
    text = [_token(str(word), real(loss)) for word, loss in pairs]
    worst = one.get("worst")
    rows = [
        [tag("code", str(row[0])), *(Number(figure(x, ".2f"), real(x)) for x in row[1:]), _lost(row)]
        for row in (worst if isinstance(worst, list) else [])
        if isinstance(row, list) and len(row) == 3
    ]
    caption = f"Window {figure(one.get('index'), '.0f')}: tokens that lost most, nats"
    return tag(
        "article",
        tag("h4", title),
        tag("p", f"{figure(before, '.3f')} nats a token before, {figure(after, '.3f')} after."),
        tag("pre", *text, class_="text", tabindex=0) if text else None,
        folded("Tokens that lost most", table(caption, ["token", "before", "after", "lost"], rows))
        if rows
        else None,
        class_="window",
    )


def _lost(row: list[Any]) -> Number:
    before, after = real(row[1]), real(row[2])
    lost = None if before is None or after is None else after - before
    return Number(figure(lost, "+.2f"), lost)


def _token(text: str, lost: float | None) -> Content:
    level = 0 if lost is None else sum(lost >= limit for limit in MARKED)
    if not level:
        return tag("span", text, keep="\n\t")
    return tag("span", text, keep="\n\t", class_=f"h{level}", title=f"{figure(lost, '+.2f')} nats")
