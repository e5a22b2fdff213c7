"""Tables in Markdown of what bench/peers.py measured; on a page they stand between two comments."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

LOST = 0.03  # of a round, in which something waited for a core
APART = 3600  # seconds between two measurements of one round, from which on they are not of one occasion
PHASES = {"decode": "decode", "batch": "16 at once", "prompt": "prompt of 512"}
TITLES = {"130m": "mamba-130m", "1.4b": "mamba-1.4b"}
SHORT = ("130m", "1.4b")  # shapes of the README
MILLION = 1e6
Cell = Mapping[str, Any]
Row = tuple[str, list[float | None]]


def counted(cell: Cell) -> dict[str, dict[str, float]]:
    """The rounds that count, by number: the undisturbed ones, or all if there are none."""
    rounds = cell.get("rounds", {})
    return {turn: one for turn, one in rounds.items() if one.get("lost", 0) <= LOST} or rounds


def speed(cell: Cell, phase: str) -> float | None:
    """Tokens a second of all sequences together, the median of the rounds."""
    found = [one[phase] for one in counted(cell).values()]
    return 1 / statistics.median(found) if found else None


def ratio(cell: Cell, base: Cell, phase: str) -> float | None:
    """How many times as fast as another one: of each round, then the median. None: no round has both."""
    one, other = counted(cell), counted(base)
    pairs = [(one[turn], other[turn]) for turn in one if turn in other]
    near = [(a, b) for a, b in pairs if abs(a["at"] - b["at"]) <= APART]
    return statistics.median(b[phase] / a[phase] for a, b in near) if near else None


def grown(cell: Cell) -> float | None:
    """Bytes by which its process grew."""
    found = [one["grown"] for one in cell.get("rounds", {}).values()]
    return statistics.median(found) if found else None


def figure(value: float | None, best: bool) -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
    return f"**{text}**" if best else text


def markdown(heads: Sequence[str], rows: Sequence[Row], least: Collection[int] = ()) -> str:
    """The best of a column is bold: the most, or of the columns `least`, which are bytes, the least."""
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    best = []
    for place in range(len(heads)):
        values = [value for _, found in rows if (value := found[place]) is not None]
        best.append((min if place in least else max)(values, default=None))
    for name, found in rows:
        cells = (figure(value, value == best[place]) for place, value in enumerate(found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def title(shape: str) -> str:
    return TITLES.get(shape, shape)


def one(results: Mapping[str, Any], shape: str) -> str:
    """All of one shape: bytes, then tokens a second by phase and threads."""
    cells = results["cells"][shape]
    names = list(dict.fromkeys(name for of in cells.values() for name in of))
    heads = ["MB on disk", "MB the process grew"]
    heads += [
        f"{words}, {threads} thread{'s' * (threads != '1')}" for words in PHASES.values() for threads in cells
    ]
    rows: list[Row] = []
    for name in names:
        of = [cells[threads].get(name, {}) for threads in cells]
        sizes = [
            next((cell["disk"] for cell in of if "disk" in cell), None),
            next(filter(None, map(grown, of)), None),
        ]
        bytes_ = [size / MILLION if size else None for size in sizes]
        rows.append((name, bytes_ + [speed(cell, phase) for phase in PHASES for cell in of]))
    text = f"{title(shape)}, tokens per second:\n\n{markdown(heads, rows, (0, 1))}"
    return "\n\n".join((text, *_failures(cells)))


def ratios(results: Mapping[str, Any], shape: str, base: str) -> str:
    """How many times as fast as one variant."""
    cells = results["cells"][shape]
    heads = [f"{words}, {threads}" for words in PHASES.values() for threads in cells]
    rows: list[Row] = []
    for name in dict.fromkeys(name for of in cells.values() for name in of):
        of = [(cells[threads].get(name, {}), cells[threads].get(base, {})) for threads in cells]
        rows.append((name, [ratio(cell, other, phase) for phase in PHASES for cell, other in of]))
    return f"{title(shape)}, times as fast as {base}, by threads:\n\n{markdown(heads, rows)}"


def short(results: Mapping[str, Any]) -> str:
    """For the README: two shapes, the most threads that were measured."""
    shapes = [shape for shape in SHORT if shape in results["cells"]]
    last = {shape: list(results["cells"][shape])[-1] for shape in shapes}
    heads = [f"{title(shape)}: {words}" for shape in shapes for words in ("MB", *PHASES.values())]
    names = dict.fromkeys(name for shape in shapes for name in results["cells"][shape][last[shape]])
    rows: list[Row] = []
    for name in names:
        values: list[float | None] = []
        for shape in shapes:
            cell = results["cells"][shape][last[shape]].get(name, {})
            values += [cell["disk"] / MILLION if "disk" in cell else None]
            values += [speed(cell, phase) for phase in PHASES]
        rows.append((name, values))
    return markdown(heads, rows, range(0, len(heads), len(PHASES) + 1))


def chosen(results: Mapping[str, Any]) -> str:
    """Which types llama-quantize chose, in MB of the tensors of each."""
    lines = [
        "| | " + " | ".join(map(title, results["cells"])) + " |",
        "|---" * (len(results["cells"]) + 1) + "|",
    ]
    found: dict[str, dict[str, str]] = {}
    for shape, threads in results["cells"].items():
        for cells in threads.values():
            for name, cell in cells.items():
                if "types" in cell:
                    told = ", ".join(f"{kind} {size / MILLION:.1f}" for kind, size in cell["types"].items())
                    found.setdefault(name, {})[shape] = told
    lines += [
        f"| {name} | " + " | ".join(of.get(shape, "-") for shape in results["cells"]) + " |"
        for name, of in found.items()
    ]
    return "MB of tensors by their type:\n\n" + "\n".join(lines)


def machine(results: Mapping[str, Any]) -> str:
    """Where it was measured, and how many rounds were."""
    where = results["machine"]
    cells = [cell for of in results["cells"].values() for by in of.values() for cell in by.values()]
    rounds = [cell["rounds"] for cell in cells if cell.get("rounds")]
    least, most = min(map(len, rounds)), max(map(len, rounds))
    lost = sum(one.get("lost", 0) > LOST for of in rounds for one in of.values())
    number = str(least) if least == most else f"{least} to {most}"
    return (
        f"{where['cpu']}, {where['cores']} cores, kernels {where['kernels']}; torch {where['torch']}, "
        f"transformers {where['transformers']}, llama.cpp {where['llama.cpp']}. Medians of {number} rounds "
        f"in turn; {lost} of {sum(map(len, rounds))} measurements were disturbed by other work."
    )


def _failures(cells: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    return [
        f"{name}, {threads} threads: not measured, {cell['failed']}"
        for threads, of in cells.items()
        for name, cell in of.items()
        if "failed" in cell
    ]


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """All that pages can have, by the name that their comments say."""
    found = {"peers-machine": machine(results), "peers-short": short(results)}
    found["peers"] = "\n\n".join(one(results, shape) for shape in results["cells"])
    base = next(iter(next(iter(next(iter(results["cells"].values())).values()))))
    found["peers-ratios"] = "\n\n".join(ratios(results, shape, base) for shape in results["cells"])
    found["peers-types"] = chosen(results)
    return found


def put(text: str, found: Mapping[str, str]) -> str:
    """A page with the text between `<!-- NAME -->` and `<!-- end of NAME -->` replaced.

    Raises:
        ValueError: the page has none of these places, or one does not end.
    """
    places = [name for name in found if f"<!-- {name} -->" in text]
    if not places:
        raise ValueError(f"no comments of the names {', '.join(found)}")
    for name in places:
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"{first} must stand once, and be ended once")
        text = re.sub(
            f"{re.escape(first)}.*?{re.escape(last)}",
            lambda _, name=name: f"<!-- {name} -->\n{found[name]}\n<!-- end of {name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


def write(page: Path, results: Mapping[str, Any]) -> None:
    """Put the tables on a page."""
    page.write_text(put(page.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
