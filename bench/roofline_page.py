"""Tables in Markdown of what bench/roofline.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cell = Mapping[str, Any]
MOST = 12  # products that the table of what is left has
HEADS = ("bits", "inputs", "cycles", "GB/s", "GMAC/s", "limit, share of the time")


def line(cell: Cell) -> str:
    """One measurement, while it goes on."""
    disturbed = " DISTURBED" if cell["disturbed"] else ""
    return (
        f"{cell['shape']} {cell['form']}, {cell['from']}, {cell['level']}, {cell['threads']} threads, "
        f"{cell['inputs']} inputs: {1e6 * cell['seconds']:.0f} us, {cell['cycles']:.2f} cycles, "
        f"{cell['GB/s']:.1f} GB/s, {cell['GMAC/s']:.1f} GMAC/s, "
        f"{cell['limit']} {cell['share']:.0%}{disturbed}"
    )


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """By the names in the comments of the page."""
    cells = found["cells"]
    levels = list(dict.fromkeys(cell["level"] for cell in cells))
    return {
        "roofline-machine": machine(found),
        "roofline-limits": limits(found),
        "roofline": "\n\n".join(
            best(cells, levels[-1], shape, place, threads)
            for shape, place, threads in dict.fromkeys(
                (cell["shape"], cell["from"], cell["threads"]) for cell in cells
            )
        ),
        "roofline-left": left(cells, levels[-1]),
        "roofline-levels": older(cells, levels),
    }


def machine(found: Mapping[str, Any]) -> str:
    where, cells = found["machine"], found["cells"]
    disturbed = sum(cell["disturbed"] for cell in cells)
    clock = max(limit["hertz"] for limit in found["limits"].values()) / 1e9
    return (
        f"{where['cpu']}, {where['cores']} cores at {clock:.2f} GHz, torch {where['torch']}; "
        f"{len(cells)} products measured, {disturbed} of them only while other work disturbed them."
    )


def limits(found: Mapping[str, Any]) -> str:
    """What the machine gives at most."""
    rows = []
    for threads, limit in found["limits"].items():
        for place, rate in limit["bytes"].items():
            rows.append(
                [f"read from {'the last cache' if place == 'cache' else place}", threads, rate, "GB/s"]
            )
        for level, rates in limit["products"].items():
            for kind, rate in rates.items():
                rows.append([f"products of {kind}, {level}", threads, rate, "GMAC/s"])
    by: dict[tuple[str, str], dict[str, float]] = {}
    for name, threads, rate, unit in rows:
        by.setdefault((name, unit), {})[threads] = rate / 1e9
    heads = [f"{threads} thread{'s' * (str(threads) != '1')}" for threads in found["limits"]]
    lines = [
        f"| {name}, {unit} | " + " | ".join(f"{of[threads]:.1f}" for threads in found["limits"]) + " |"
        for (name, unit), of in by.items()
    ]
    return "\n".join(["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *lines])


def best(cells: Sequence[Cell], level: str, shape: str, place: str, threads: int) -> str:
    """All of the fastest level."""
    lines = ["| | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    wanted = (level, shape, place, threads)
    for cell in cells:
        if (cell["level"], cell["shape"], cell["from"], cell["threads"]) == wanted:
            values = [f"{cell['bits']:.2f}", cell["inputs"], f"{cell['cycles']:.2f}", f"{cell['GB/s']:.1f}"]
            values += [f"{cell['GMAC/s']:.1f}", f"{cell['limit']}, {cell['share']:.2f}"]
            lines.append(f"| {cell['form']} | " + " | ".join(map(str, values)) + " |")
    number = f"{threads} thread{'s' * (threads != 1)}"
    where = "memory" if place == "memory" else "the last cache"
    return f"in_proj of mamba-{shape} from {where}, {level}, {number}:\n\n" + "\n".join(lines)


def left(cells: Sequence[Cell], level: str) -> str:
    """Where the next factor lies: the products of the fastest level by what a limit does not explain, as far
    as other work did not disturb them."""
    clean = (cell for cell in cells if cell["level"] == level and not cell["disturbed"])
    found = sorted(clean, key=lambda cell: cell["share"])
    lines = ["| | in_proj of | from | threads | inputs | times as long as its limit |", "|---" * 6 + "|"]
    for cell in found[:MOST]:
        fields = [cell["form"], cell["shape"], cell["from"], cell["threads"], cell["inputs"]]
        longer = f"{1 / cell['share']:.1f} ({cell['limit']})"
        lines.append("| " + " | ".join(map(str, [*fields, longer])) + " |")
    return "\n".join(lines)


def older(cells: Sequence[Cell], levels: Sequence[str]) -> str:
    """Cycles of every level with the first number of threads and the largest shape; all inputs in a field."""
    alone = [cell for cell in cells if cell["from"] == "memory" and cell["threads"] == cells[0]["threads"]]
    shape = alone[-1]["shape"]
    lines = ["| | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for form in dict.fromkeys(cell["form"] for cell in alone):
        fields = []
        for level in levels:
            of = [c for c in alone if (c["form"], c["level"], c["shape"]) == (form, level, shape)]
            told = ", ".join(f"{cell['cycles']:.1f}" for cell in of)
            shares = ", ".join(f"{cell['limit'][0]} {cell['share']:.2f}" for cell in of)
            fields.append(f"{told} ({shares})")
        lines.append(f"| {form} | " + " | ".join(fields) + " |")
    threads = cells[0]["threads"]
    return f"mamba-{shape}, from memory, threads: {threads}:\n\n" + "\n".join(lines)
