"""What an analysis found: sums over layers, the most sensitive matrices, a sentence, heat maps.

Place in the flow: after tolerance.py; `cli` prints what comes from here. Nothing is measured here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsessm.report.fed import fed_table
from sparsessm.studies.tolerance import Analysis, replace_file

# A divergence of so many nats raises the perplexity by about as much: 0.01 is 1 %.
TOLERATED = 0.01
LISTED = 5  # most sensitive cells that are told
PICTURE = "analysis.png"
Table = tuple[str, list[str], list[list[str]], int]  # title, columns, cells, columns that are words


class Map(NamedTuple):
    """The divergences at one sparsity.

    Attributes:
        title: in words. rows: layers. columns: kinds.
        values: [layer][kind]; None where there is no such matrix.
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def maps(analysis: Analysis) -> list[Map]:
    """One for each sparsity, with a last row of sums."""
    kinds = list(dict.fromkeys(cell.kind for cell in analysis.cells))
    layers = sorted({cell.layer for cell in analysis.cells})
    found = []
    for sparsity in _sparsities(analysis):
        kls = {(c.layer, c.kind): c.kl for c in analysis.cells if c.sparsity == sparsity}
        values = [[kls.get((layer, kind)) for kind in kinds] for layer in layers]
        title = f"KL of the logits, one matrix alone at {_percent(sparsity)}"
        found.append(Map(title, [str(layer) for layer in layers], kinds, values))
    return found


def summary(analysis: Analysis) -> dict[str, Any]:
    """The same in plain values.

    Returns:
        "tolerated": nats, the limit. "kinds": of each kind its entries, the sum of KL over its layers by
        sparsity ("kl"), the largest sparsity at which that sum is within the limit ("tolerates", None if
        none is), and its most sensitive layer ("worst"). "most_sensitive": cells at the largest sparsity, the
        worst first, with their share of all KL there. "experts": by the name of the tensor that holds their
        matrices, the "tokens" that each saw and the "inputs" of one. "conclusion": a sentence.
    """
    sparsities = _sparsities(analysis)
    highest = [cell for cell in analysis.cells if cell.sparsity == max(sparsities, default=0)]
    total = math.fsum(cell.kl for cell in highest)
    kinds = {}
    for kind in dict.fromkeys(cell.kind for cell in analysis.cells):
        cells = [cell for cell in analysis.cells if cell.kind == kind]
        sums = {s: math.fsum(cell.kl for cell in cells if cell.sparsity == s) for s in sparsities}
        within = [
            s for s in sparsities if all(sums[lower] <= TOLERATED for lower in sparsities if lower <= s)
        ]
        kinds[kind] = {
            "family": cells[0].family,
            "entries": sum({cell.target: cell.entries for cell in cells}.values()),
            "kl": {f"{s:g}": sums[s] for s in sparsities},
            "tolerates": max(within, default=None),
            "worst": max((cell for cell in cells if cell in highest), key=lambda cell: cell.kl).layer,
        }
    worst = sorted(highest, key=lambda cell: -cell.kl)[:LISTED]
    listed = [
        {"target": c.target, "layer": c.layer, "kind": c.kind, "sparsity": c.sparsity, "kl": c.kl}
        | {"share": c.kl / total if total > 0 else 0.0}
        for c in worst
    ]
    experts = {
        cell.target: {"tokens": list(cell.tokens), "inputs": cell.inputs}
        for cell in analysis.cells
        if cell.tokens is not None
    }
    found = {"tolerated": TOLERATED, "kinds": kinds, "most_sensitive": listed, "experts": experts}
    return {**found, "conclusion": _conclusion(found, sparsities)}


def summary_tables(found: dict[str, Any]) -> list[Table]:
    """What `summary` returned, for people."""
    limit = found["tolerated"]
    sparsities = list(next(iter(found["kinds"].values()))["kl"])
    kinds = [
        [
            kind,
            f"{facts['entries']:,}",
            *map(brief, facts["kl"].values()),
            "-" if facts["tolerates"] is None else _percent(facts["tolerates"]),
            str(facts["worst"]),
        ]
        for kind, facts in found["kinds"].items()
    ]
    columns = [
        "kind",
        "entries",
        *(f"at {_percent(float(s))}" for s in sparsities),
        "tolerates",
        "worst layer",
    ]
    cells = [
        [cell["target"], _percent(cell["sparsity"]), brief(cell["kl"]), _percent(cell["share"])]
        for cell in found["most_sensitive"]
    ]
    tables: list[Table] = [
        (
            f"KL by kind, sums over layers; tolerated: {limit:g}, about {_percent(limit)} of perplexity",
            columns,
            kinds,
            1,
        ),
        ("The most sensitive matrices", ["matrix", "sparsity", "KL", "share of all"], cells, 1),
    ]
    if found["experts"]:
        tables.append(fed_table(found["experts"]))
    return tables


def draw(analysis: Analysis, path: Path) -> None:
    """Write the heat maps as a PNG.

    Raises:
        ValueError: as `refuse_without_matplotlib`.
    """
    refuse_without_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    panels = maps(analysis)
    low, high = bounds(panels)
    rows, columns = len(panels[0].rows), len(panels[0].columns)
    size = (len(panels) * (0.75 * columns + 0.6) + 1.2, 0.32 * rows + 1.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    norm, image = LogNorm(low, high), None
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        filled = [[math.nan if kl is None else max(kl, low) for kl in line] for line in panel.values]
        image = axis.imshow(filled, norm=norm, cmap="YlOrRd", aspect="auto")
        axis.set_title(panel.title.rpartition(" at ")[2], fontsize=9)
        axis.set_xticks(range(columns), panel.columns, fontsize=7, rotation=30)
        axis.set_yticks(range(rows), panel.rows, fontsize=7)
        for y, line in enumerate(panel.values):
            for x, kl in enumerate(line):
                if kl is not None:
                    colour = "white" if norm(max(kl, low)) > 0.65 else "black"
                    axis.text(x, y, brief(kl), ha="center", va="center", fontsize=6, color=colour)
        if number == 0:
            axis.set_ylabel("layer", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=axes, label="KL (nats a token)")
    figure.suptitle(f"{analysis.settings['model']}: one matrix pruned alone", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_file(path, content.getvalue())


def refuse_without_matplotlib() -> None:
    """Raises ValueError: matplotlib is not installed; names the extra."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the heat map (PNG) needs matplotlib; install sparsessm[plot], or leave out -o"
        ) from error


def bounds(panels: Sequence[Map]) -> tuple[float, float]:
    """The ends of a colour scale that all maps share: least and greatest divergence above zero."""
    kls = [kl for panel in panels for line in panel.values for kl in line if kl]
    low, high = min(kls, default=1e-9), max(kls, default=1e-9)
    return low, max(high, 10 * low)


def _sparsities(analysis: Analysis) -> list[float]:
    return sorted({cell.sparsity for cell in analysis.cells})


def _conclusion(found: dict[str, Any], sparsities: Sequence[float]) -> str:
    """What is in the summary, in plain language."""
    said = []
    for sparsity in [*reversed(sparsities), None]:
        names = [kind for kind, facts in found["kinds"].items() if facts["tolerates"] == sparsity]
        if names and sparsity is None:
            said.append(f"{_listed(names)} not even {_percent(sparsities[0])}")
        elif names:
            said.append(f"{_listed(names)} up to {_percent(sparsity)}")
    worst = found["most_sensitive"][0]
    share, sparsity = _percent(worst["share"]), _percent(worst["sparsity"])
    return (
        f"Pruned alone, summed over the layers and within {TOLERATED:g} nats (about {_percent(TOLERATED)} of "
        f"perplexity): {'; '.join(said)}. Most sensitive is {worst['kind']} of layer {worst['layer']}, with "
        f"{share} of all divergence at {sparsity}."
    )


def brief(kl: float) -> str:
    """Two digits and a power of ten: 2.6e-3."""
    return f"{kl:.1e}".replace("e-0", "e-") if kl else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
