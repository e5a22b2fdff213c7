"""What it costs: perplexity, KL, tasks, bytes, speed, and what other sizes would cost.

Place in the flow: between `parts.py` and the whole page. A section of which nothing is known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import pictures
from .markup import Content, Safe, tag, together
from .measured import Measured
from .parts import Number, listed, picture, section, table
from .words import (
    NONE,
    at,
    between,
    change,
    figure,
    number_at,
    percent,
    plainly,
    real,
    rows_at,
    size,
    table_at,
    times,
)


def cost(perplexity: Mapping[str, Any], measured: Measured) -> Safe | None:
    """Perplexity, KL and tasks."""
    parts: list[Content] = []
    dense, ours = table_at(perplexity, "dense"), table_at(perplexity, "pruned")
    if dense or ours:
        rows = []
        for name, one in (("dense", dense), ("compressed", ours)):
            value, low, high = (number_at(one, word) for word in ("perplexity", "low", "high"))
            interval = NONE if None in (low, high) else f"{figure(low, '.2f')} to {figure(high, '.2f')}"
            rows.append(
                [
                    name,
                    Number(figure(value, ".2f"), value),
                    interval,
                    Number(figure(one.get("bits_per_byte"), ".4f"), real(one.get("bits_per_byte"))),
                ]
            )
        difference = table_at(perplexity, "difference")
        ends = between(difference.get("low"), difference.get("high"))
        rows.append(["change", change(difference.get("mean")), ends or NONE, ""])
        caption = "Perplexity"
        parts += [
            _measured_on(ours),
            table(caption, ["model", "perplexity", "95 % interval", "bits per byte"], rows, sorts=False),
        ]
    if kl := measured.divergence:
        interval = [number_at(kl, word) for word in ("low", "high")]
        ends = (
            ""
            if None in interval
            else f" (95 %: {figure(interval[0], '.2g')} to {figure(interval[1], '.2g')})"
        )
        parts.append(
            tag(
                "p",
                f"At {percent(kl.get('same'))} of {figure(kl.get('tokens'), ',.0f')} tokens both models find "
                "the same next token the likeliest. The predictions differ by "
                f"{figure(kl.get('mean'), '.2g')} nats a token on average{ends}, KL(dense || compressed).",
            )
        )
    if tasks := _tasks(measured.tasks):
        parts += [tag("h3", "Tasks"), tasks]
    return section("cost", "What it costs", *parts) if parts else None


def _measured_on(one: Mapping[str, Any]) -> Safe:
    counts = f"{figure(one.get('windows'), ',.0f')} windows of {figure(one.get('length'), ',.0f')} tokens"
    text = f"Both models read the same {counts} of {one.get('data') or 'a text'}. "
    return tag("p", f"{text}The change is paired window by window, so the windows' own difficulty cancels.")


def _tasks(told: Mapping[str, Any]) -> Safe | None:
    columns, cells = told.get("columns"), told.get("cells")
    if not isinstance(columns, list) or not isinstance(cells, list) or not cells:
        return None
    rows = [[str(cell) for cell in row] for row in cells if isinstance(row, list)]
    words = told.get("words")
    made = table(
        str(told.get("title")),
        [*map(str, columns)],
        rows,
        words=words if isinstance(words, int) else 1,
        sorts=False,  # cells of words: numbers would be sorted as text
    )
    notes = told.get("notes")
    return together(made, listed([*map(str, notes)]) if isinstance(notes, list) else None)


def bytes_and_speed(measured: Measured) -> Safe | None:
    """On the machine of the measurement, beside dense."""
    parts: list[Content] = []
    ours, dense = (table_at(measured.sizes, name) for name in ("result", "dense"))
    rows: list[list[Content | Number]] = []
    for title, name in (("weights on disk", "weights"), ("all files on disk", "all")):
        rows.append(_against(title, ours.get(name), dense.get(name), size))
    models = rows_at(measured.speed, "models")
    mine, its = (models[place] if place < len(models) else {} for place in (0, 1))
    for title, name in (
        ("weights in memory", "resident"),
        ("read for one token", "read_per_step"),
        ("state of a sequence", "state_per_sequence"),
    ):
        if models:
            rows.append(_against(title, at(mine, "bytes", name), at(its, "bytes", name), size))
    if any(real(one.get("weights")) is not None for one in (ours, dense)):
        parts.append(table("Bytes", ["", "dense", "compressed", "ratio"], rows, sorts=False))
    speeds = []
    prompt = figure(measured.speed.get("prompt_tokens"), ",.0f")
    for title, keys in (
        ("writing, one sequence", ("decode", "1")),
        (f"reading a prompt of {prompt} tokens", ("prompt",)),
    ):
        if models:
            ratio = table_at(measured.speed, "ratios", *keys)
            speeds.append(
                [
                    title,
                    _spread(at(its, "tokens_per_second", *keys), ",.0f"),
                    _spread(at(mine, "tokens_per_second", *keys), ",.0f"),
                    _spread(ratio, ".2f"),
                ]
            )
    if speeds:
        threads = number_at(measured.speed, "threads")
        word = "thread" if threads == 1 else "threads"
        caption = f"Tokens per second, {figure(threads, '.0f')} {word}: median (first to third quartile)"
        parts.append(table(caption, ["", "dense", "compressed", "times as fast"], speeds, sorts=False))
        ran = "Both models ran in the same engine, round by round" if len(models) > 1 else "Measured"
        parts.append(tag("p", f"{ran}, on {_machine(measured)}."))
        notes = measured.speed.get("notes")
        parts.append(listed([*map(str, notes)]) if isinstance(notes, list) else None)
    return section("speed", "Bytes and speed", *parts) if parts else None


def _machine(measured: Measured) -> str:
    cpu = measured.machine.get("cpu")
    day = f" on {measured.day}" if measured.day else ""
    return f"{cpu if isinstance(cpu, str) and cpu else 'the machine of the measurement'}{day}"


def _against(title: str, ours: Any, dense: Any, written: Any) -> list[Content | Number]:
    mine, its = real(ours), real(dense)
    ratio = figure(mine / its, ".3f") if mine is not None and its else NONE
    return [title, Number(written(its), its), Number(written(mine), mine), ratio]


def _spread(value: Any, form: str) -> Number:
    median, low, high = (number_at(value, word) for word in ("median", "low", "high"))
    if median is None:
        return Number(NONE, None)
    ends = "" if low is None or high is None else f" ({figure(low, form)} to {figure(high, form)})"
    return Number(f"{figure(median, form)}{ends}", median)


def speed_ratio(measured: Measured) -> Mapping[str, Any]:
    """How many times as fast one sequence is decoded: "median", "low", "high"; empty where unknown."""
    return table_at(measured.speed, "ratios", "decode", "1")


def speed_key(measured: Measured) -> tuple[str, str] | None:
    """The key figure of speed, and what stands behind it."""
    ratio = speed_ratio(measured)
    models = rows_at(measured.speed, "models")
    if not models:
        return None
    ours = figure(number_at(models[0], "tokens_per_second", "decode", "1", "median"), ",.0f")
    if number_at(ratio, "median") is None:
        return f"{ours}", "tokens per second, one sequence"
    its = (
        figure(number_at(models[1], "tokens_per_second", "decode", "1", "median"), ",.0f")
        if len(models) > 1
        else NONE
    )
    return times(ratio.get("median")), f"as fast: {ours} tokens/s, dense {its}"


def frontier(fit: Mapping[str, Any] | None) -> Safe | None:
    """What other sizes would cost, where a search tried them."""
    points = rows_at(fit, "points")
    if not points:
        return None
    chosen = at(fit, "chosen")
    chosen = chosen.get("bits") if isinstance(chosen, Mapping) else chosen
    drawn = pictures.frontier("frontier-picture", "Perplexity against bytes", points, chosen)
    rows = [
        [
            Number(figure(point.get("bits"), "g"), real(point.get("bits"))),
            Number(size(point.get("bytes")), real(point.get("bytes"))),
            Number(change(point.get("increase")), real(point.get("increase"))),
            between(point.get("low"), point.get("high")) or NONE,
            " ".join(
                [
                    *(["chosen"] if chosen is not None and point.get("bits") == chosen else []),
                    plainly(point.get("note")),
                ]
            ).strip(),
        ]
        for point in points
    ]
    why, refused = plainly(at(fit, "why")), at(fit, "refused")
    caption = "Sizes that were tried"
    return section(
        "frontier",
        "What other sizes would cost",
        tag("p", why) if why else None,
        picture(drawn, "Each point is one size; bars are 95 % intervals. Lower left is better.", alone=True),
        table(
            caption,
            ["bits a weight", "bytes", "perplexity", "95 % interval", "note"],
            rows,
            words=0,
            remarks=True,
        ),
        together(tag("h3", "Refused"), listed(_items(refused))) if _items(refused) else None,
    )


def _items(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [text for one in values if (text := plainly(one))]
