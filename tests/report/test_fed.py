"""Calibration tokens of experts, as a record and an analysis say them."""

from __future__ import annotations

from sparsessm.report.fed import LISTED, fed, fed_table

ROWS = [
    {"target": "a.in_proj.weight", "tokens": None, "inputs": None},
    {"target": "a.experts.up_proj.0", "tokens": 500, "inputs": 64},
    {"target": "a.experts.up_proj.1", "tokens": 0, "inputs": 64},
    {"target": "a.experts.up_proj.2", "tokens": 1000, "inputs": 64},
    {"target": "a.experts.down_proj.0", "tokens": 40, "inputs": 32},
    {"target": "old.experts.down_proj.0", "tokens": 3},
]


def test_rows_of_experts_are_put_together() -> None:
    found = fed(ROWS)
    assert found == {
        "a.experts.up_proj": {"tokens": [500, 0, 1000], "inputs": 64},
        "a.experts.down_proj": {"tokens": [40], "inputs": 32},
    }
    _, columns, cells, _ = fed_table(found)
    assert cells == [
        ["a.experts.up_proj", "1 (0)", "0", "500", "1,000", "64"],
        ["a.experts.down_proj", "none", "40", "40", "40", "32"],
    ]
    assert all(len(line) == len(columns) for line in cells)


def test_not_all_of_many_starved_experts_are_named() -> None:
    _, _, ((_, told, *_),), _ = fed_table({"x": {"tokens": [1] * 20, "inputs": 2}})
    assert told.endswith(f"{LISTED - 1} (1) ...")
