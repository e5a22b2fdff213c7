"""Prints the table of docs/architectures.md: what is supported for which architecture, from the code.

python tools/support_table.py
"""

from __future__ import annotations

from sparsessm.architectures import MODEL_TYPES
from sparsessm.methods.patterns import AXES
from sparsessm.runtime.base import FIELDS


def table() -> str:
    """Markdown, a row for each model type."""
    columns = ["model_type", "what it is", "unstructured, N:M", *AXES, "runtime"]
    lines = [columns, ["---"] * len(columns)]
    for name, kind in MODEL_TYPES.items():
        marks = ["yes" if axis in kind.structure else "" for axis in AXES]
        about = str(kind.__doc__).splitlines()[0].partition(" (`")[0].rstrip(".")
        lines.append([f"`{name}`", about, "yes", *marks, "yes" if name in FIELDS else ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
