"""Plots as inline SVG whose colours follow light and dark; drawn by matplotlib (the extra `plot`).

Place in the flow: below the sections of the page. matplotlib draws with colours that stand for roles
(`ROLES`); what it wrote is read again, and only known elements and attributes are made anew by `markup.tag`,
with CSS variables for the roles and no `style`, so that the page's policy holds.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .layers import Cell, kinds
from .markup import Safe, plain, tag
from .words import bin_words, percent, real, rows_at, size
from .words import figure as number

LEVELS = 7  # of the ramp of a heat map
APART = 30.0  # a rise so many times the least is drawn on a logarithmic axis, or the least is not seen
SERIES = 6  # lines that one picture tells apart
WIDTH, HEIGHT = 4.8, 2.8  # inches; 72 units of the drawing each
_ROLES = ("ink", "soft", "line", "card", *(f"s{number}" for number in range(1, SERIES + 1)))
ROLES = {role: f"#{place:02x}a55a" for place, role in enumerate(_ROLES)}
ROLES |= {f"q{level}": f"#{level:02x}5aa5" for level in range(LEVELS)}
_VARIABLES = {colour: f"var(--{role})" for role, colour in ROLES.items()}
_MARKERS = "os^Dvp"
_ELEMENTS = {"g", "path", "text", "tspan", "use", "defs", "clipPath", "rect", "line", "polyline", "polygon"}
_ATTRIBUTES = {"d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "points", "transform", "clip-path"}
_STYLES = {
    "fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin",
    "stroke-dasharray", "stroke-dashoffset", "opacity", "text-anchor", "font-size",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def refuse_without_matplotlib() -> None:
    """Raises ValueError: matplotlib is not installed; names the extra."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError('the pictures of a report need matplotlib: pip install "sparsessm[plot]"') from error


def heat(name: str, title: str, found: Sequence[Cell], field: str) -> Safe | None:
    """Layers from left to right, kinds of matrices from top to bottom; None where no cell has the value.

    Args:
        name: of the picture on the page. field: of `Cell`.
    """
    values: list[tuple[Cell, float]] = [(c, value) for c in found if (value := getattr(c, field)) is not None]
    if not values:
        return None
    high = max(value for _, value in values)
    rows, layers = kinds([cell for cell, _ in values]), _places([cell for cell, _ in values])
    tips: dict[str, str] = {}
    written = percent if field == "sparsity" else (lambda v: number(v, ".2f"))
    with _drawing(0.8 + 0.26 * len(rows), 0.14, 0.26 * len(rows)) as (figure, ramp, axis):
        from matplotlib.patches import Rectangle

        for place, (cell, value) in enumerate(values):
            level = value / high if high > 0 else 0.0
            box = Rectangle((layers.index(cell.place), rows.index(cell.kind)), 1, 1, linewidth=0.8)
            box.set_facecolor(ROLES[f"q{min(int(level * LEVELS), LEVELS - 1)}"])
            box.set_edgecolor(ROLES["card"])
            box.set_gid(f"tip{place}")
            tips[f"tip{place}"] = f"{cell.kind}, layer {cell.place}: {written(value)}"
            axis.add_patch(box)
        axis.set(xlim=(0, len(layers)), ylim=(len(rows), 0), xlabel="layer")
        shown = _some(range(len(layers)), last=layers[-1] == "end")
        axis.set_xticks([place + 0.5 for place in shown], [layers[place] for place in shown])
        axis.set_yticks([place + 0.5 for place in range(len(rows))], [_label(kind) for kind in rows])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        _draw_ramp(ramp, written(0.0), written(high))
        return _svg(figure, name, title, tips)


def lines(name: str, title: str, found: Sequence[Cell]) -> Safe | None:
    """Error by layer, a line for each kind: the `SERIES` kinds that have the largest; None without errors."""
    order = sorted({cell.layer for cell in found})
    values = {
        kind: [
            (order.index(cell.layer), error)
            for cell in found
            if cell.kind == kind and (error := cell.error or 0) > 1e-30
        ]
        for kind in kinds(list(found))
    }
    values = {kind: points for kind, points in values.items() if points}
    if not values:
        return None
    largest = sorted(values, key=lambda kind: -max(error for _, error in values[kind]))[:SERIES]
    with _drawing(HEIGHT) as (figure, axis):
        for place, kind in enumerate(largest):
            colour = ROLES[f"s{place + 1}"]
            layers, errors = zip(*values[kind], strict=True)
            how = {"color": colour, "marker": _MARKERS[place], "markersize": 4, "linewidth": 1.4}
            axis.plot(layers, errors, label=_label(kind), **how)
        axis.set_yscale("log")
        axis.set(xlabel="layer", ylabel="error / output")
        _ticks_of_powers(axis.yaxis)
        names = {cell.layer: cell.place for cell in found}
        shown = _some(range(len(order)), last="end" in names.values())
        axis.set_xticks(shown, [names[order[place]] for place in shown])
        axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8)
        return _svg(figure, name, title, {})


def histogram(name: str, title: str, edges: Sequence[float], counts: Sequence[float], mean: float) -> Safe:
    """Tokens by KL, bins of half a power of ten; the mean as a line.

    Args:
        edges: lower edge of each bin, nats, the first 0. counts: tokens in each.
    """
    total = sum(counts) or 1
    tips = {}
    with _drawing(HEIGHT) as (figure, axis):
        for place, count in enumerate(counts):
            (bar,) = axis.bar(place + 0.5, 100 * count / total, width=0.9, color=ROLES["s1"], linewidth=0)
            bar.set_gid(f"tip{place}")
            tips[f"tip{place}"] = (
                f"{bin_words(edges, place)} nats: {count:,.0f} tokens, {percent(count / total)}"
            )
        powers = [(place, edge) for place, edge in enumerate(edges) if edge and _is_power(edge)]
        axis.set_xticks([place for place, _ in powers], [_power(round(math.log10(e))) for _, e in powers])
        if mean > 0 and len(edges) > 1:
            where = 1 + 2 * (math.log10(mean) - math.log10(edges[1]))
            where = min(max(where, 0.0), float(len(edges)))
            axis.axvline(where, color=ROLES["s2"], linewidth=1.4, linestyle=(0, (4, 2)))
            axis.annotate(
                f"mean {mean:.2g}", (where, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8
            )
        axis.set(
            xlabel="KL(dense || compressed) of a token, nats", ylabel="% of tokens", xlim=(0, len(edges))
        )
        return _svg(figure, name, title, tips)


def frontier(name: str, title: str, points: Sequence[Mapping[str, Any]], chosen: Any) -> Safe | None:
    """Increase of perplexity against bytes, with 95 % intervals; None where no point has both.

    Args:
        points: "bytes", "increase" (0.01 is 1 %), "low", "high", "bits". chosen: bits of the one kept.
    """
    known = [
        point
        for point in rows_at({"": points}, "")
        if _drawable(real(point.get("bytes"))) and _drawable(_rise(point))
    ]
    if not known:
        return None
    known.sort(key=lambda point: real(point["bytes"]) or 0.0)
    tips = {}
    with _drawing(HEIGHT + 0.3) as (figure, axis):
        across = [(real(point["bytes"]) or 0.0) / 1e6 for point in known]
        rises = [_rise(point) or 0.0 for point in known]
        axis.plot(across, rises, color=ROLES["s1"], linewidth=1.4)
        for place, (x, y, point) in enumerate(zip(across, rises, known, strict=True)):
            is_chosen = chosen is not None and point.get("bits") == chosen
            low, high = real(point.get("low")), real(point.get("high"))
            if low is not None and high is not None:
                axis.vlines(x, 100 * low, 100 * high, color=ROLES["s1"], linewidth=1)
            (mark,) = axis.plot(
                [x], [y], marker="D" if is_chosen else "o", markersize=8 if is_chosen else 5,
                color=ROLES["s2" if is_chosen else "s1"],
            )  # fmt: skip
            mark.set_gid(f"tip{place}")
            bits = f"{number(point.get('bits'), 'g')} bits, {size(point['bytes'])}, {number(y, '+.2f')} %"
            tips[f"tip{place}"] = f"{'chosen: ' * is_chosen}{bits}"
            where = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(("chosen, " * is_chosen) + number(point.get("bits"), "g"), (x, y), **where)
        axis.set(xlabel="MB (labels: bits a weight)", ylabel="perplexity, % above dense")
        if min(rises) > 0 and max(rises) > APART * min(rises):
            axis.set_yscale("log", nonpositive="clip")
            _ticks_of_powers(axis.yaxis)
        else:
            axis.axhline(0, color=ROLES["line"], linewidth=1)
        return _svg(figure, name, title, tips)


def _drawable(value: float | None) -> bool:
    return value is not None and abs(value) < 1e18


def _rise(point: Mapping[str, Any]) -> float | None:
    rise = real(point.get("increase"))
    return None if rise is None else 100 * rise


def _places(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.place for cell in sorted(found, key=lambda cell: cell.layer)))


def _some(values: Sequence[int], *, last: bool) -> list[int]:
    """At most a dozen or so, evenly spaced; the last one in any case, if asked for."""
    step = max(1, -(-len(values) // 12))
    shown = [*values[::step]]
    if last and shown[-1] != values[-1]:
        shown = [*(value for value in shown if values[-1] - value >= step), values[-1]]
    return shown


def _label(text: str) -> str:
    """A name on an axis: short, and only characters that matplotlib's own font has."""
    shown = ascii(plain(text))[1:-1]
    return shown if len(shown) <= 18 else f"{shown[:16]}.."


@contextmanager
def _drawing(height: float, *parts: float) -> Iterator[tuple[Any, ...]]:
    """A figure in the colours of roles with its axes, one below the other, as high as `parts` say."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sparsessm",
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "text.color": ROLES["ink"],
        "text.parse_math": False,
        "axes.edgecolor": ROLES["line"],
        "axes.labelcolor": ROLES["soft"],
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": ROLES["soft"],
        "ytick.color": ROLES["soft"],
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.subplots(max(1, len(parts)), squeeze=False, height_ratios=parts or None)[:, 0]
        for axis in axes:
            axis.patch.set_visible(False)
        yield figure, *axes


def _draw_ramp(axis: Any, low: str, high: str) -> None:
    """The ramp of a heat map, with what its ends stand for."""
    from matplotlib.patches import Rectangle

    axis.set(xlim=(0, 36), ylim=(0, 1))
    axis.set_axis_off()
    axis.text(35 - 6 - LEVELS, 0.5, low, ha="right", va="center", fontsize=8)
    for level in range(LEVELS):
        box = Rectangle((35 - 5.4 - LEVELS + level, 0.1), 1, 0.8, linewidth=0.5)
        box.set(facecolor=ROLES[f"q{level}"], edgecolor=ROLES["card"])
        axis.add_patch(box)
    axis.text(35 - 4.8, 0.5, high, va="center", fontsize=8)


def _ticks_of_powers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(round(math.log10(value)))))


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def _is_power(edge: float) -> bool:
    return abs(math.log10(edge) - round(math.log10(edge))) < 1e-6


def _svg(figure: Any, name: str, title: str, tips: Mapping[str, str]) -> Safe:
    """What matplotlib draws, made anew. `tips`: id of a group -> what it says under the pointer."""
    content = io.BytesIO()
    figure.savefig(
        content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    root = ElementTree.fromstring(content.getvalue())
    used = set(re.findall(r"#([\w-]+)", " ".join(v for node in root.iter() for v in node.attrib.values())))
    children = [_copied(node, name, used, tips) for node in root]
    label = f"{name}-title"
    return tag(
        "svg",
        tag("title", title, id=label),
        *children,
        viewBox=root.attrib["viewBox"],
        role="img",
        aria_labelledby=label,
    )


def _copied(node: ElementTree.Element, name: str, used: set[str], tips: Mapping[str, str]) -> Safe | None:
    kind = _local(node.tag)
    if kind not in _ELEMENTS:
        return None
    said: dict[str, str] = {}
    for attribute, value in node.attrib.items():
        local = _local(attribute)
        if local == "style":
            said |= _declared(value)
        elif local == "id" and value in used:
            said["id"] = f"{name}-{value}"
        elif local == "href":
            said["href"] = value.replace("#", f"#{name}-", 1)
        elif local in _ATTRIBUTES or local in _STYLES:
            said[local] = value
    if "clip-path" in said:
        said["clip-path"] = said["clip-path"].replace("#", f"#{name}-", 1)
    attributes = {word.replace("-", "_"): _VARIABLES.get(value, value) for word, value in said.items()}
    tip = tips.get(node.attrib.get("id", ""))
    text = node.text if kind in ("text", "tspan") else None
    inner = [_copied(child, name, used, tips) for child in node]
    return tag(kind, tip and tag("title", tip), text, *inner, **attributes)


def _declared(style: str) -> dict[str, str]:
    """The declarations of a `style` that a picture needs, as attributes."""
    found = {}
    for part in style.split(";"):
        word, _, value = (side.strip() for side in part.partition(":"))
        if word == "font" and (sized := re.search(r"([\d.]+)px", value)):
            found["font-size"] = sized[1]
        elif word in _STYLES:
            found[word] = value
    return found


def _local(name: Any) -> str:
    return name.rpartition("}")[2] if isinstance(name, str) else ""
