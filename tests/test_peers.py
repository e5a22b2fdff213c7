"""bench/peers.py and bench/roofline.py: their tables, programs that they run, matrices that they make."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparsessm import kernels

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    if not BENCH.is_dir():
        pytest.skip("no bench/ beside the tests (an installed package)")
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def tables(bench: None) -> ModuleType:
    import peers_table

    return peers_table


def cell(*seconds: float, disk: int = 10**6, at: int = 0, lost: tuple[float, ...] = ()) -> dict[str, Any]:
    """One variant: a token takes so many seconds in each round, at every phase."""
    rounds = {
        str(turn): dict.fromkeys(("decode", "batch", "prompt"), taken)
        | {"grown": 2 * disk, "at": at, "lost": dict(enumerate(lost)).get(turn, 0.0)}
        for turn, taken in enumerate(seconds)
    }
    return {"disk": disk, "rounds": rounds}


def results(**cells: Any) -> dict[str, Any]:
    where = dict.fromkeys(("cpu", "cores", "kernels", "torch", "transformers", "llama.cpp"), "x")
    return {"machine": where, "cells": {"130m": {"1": cells}}}


def test_the_best_of_a_column_is_bold_and_failures_are_told(tables: ModuleType) -> None:
    failed = {"disk": 3 * 10**6, "failed": "it ended"}
    text = tables.one(results(slow=cell(0.5, disk=2 * 10**6), fast=cell(0.25), broken=failed), "130m")
    assert "| slow | 2.00 | 4.00 | 2.00 | 2.00 | 2.00 |" in text
    assert "| fast | **1.00** | **2.00** | **4.00** | **4.00** | **4.00** |" in text
    assert "| broken | 3.00 | - | - | - | - |" in text and "broken, 1 threads: not measured, it ended" in text


def test_disturbed_rounds_do_not_count_where_others_are_left(tables: ModuleType) -> None:
    quiet, loud = cell(0.5, 0.1, lost=(0.0, 0.5)), cell(0.1, lost=(0.5,))
    assert tables.speed(quiet, "decode") == 2 and tables.speed(loud, "decode") == 10
    assert tables.speed({}, "decode") is None
    told = tables.machine(results(quiet=quiet, loud=loud))
    assert "1 to 2 rounds" in told and "2 of 3 measurements" in told


def test_ratios_are_of_rounds_on_one_occasion(tables: ModuleType) -> None:
    base, other = cell(4.0, 9.0, 100.0), cell(2.0, 3.0, 4.0)
    assert tables.ratio(other, base, "decode") == 3.0  # of 2, 3 and 25; the medians' is 9 / 3
    assert tables.ratio(cell(1.0), cell(4.0, at=10_000), "decode") is None
    text = tables.ratios(results(base=base, other=other), "130m", "base")
    assert "| other | **3.00** |" in text


def test_a_page_keeps_all_but_what_stands_between_its_comments(tables: ModuleType) -> None:
    page = "a\n<!-- peers -->\nold\n<!-- end of peers -->\nb\n"
    new = tables.put(page, {"peers": r"n\1ew", "other": "no"})
    assert new == "a\n<!-- peers -->\nn\\1ew\n<!-- end of peers -->\nb\n"
    assert tables.put(new, {"peers": "old"}) == page
    for wrong in ("nothing", "<!-- peers -->\nwithout an end", page + page):
        with pytest.raises(ValueError, match="comments of the names peers|must stand once"):
            tables.put(wrong, {"peers": "new"})


def test_a_program_is_watched_and_its_failure_told(bench: None) -> None:
    import peers_processes

    code = "import time; held = b'1' * 100_000_000; time.sleep(1); print('done')"
    said, most = peers_processes.program([sys.executable, "-c", code])
    assert said == "done\n" and 100_000_000 < most < 200_000_000
    with pytest.raises(peers_processes.Failed, match=r"ended with 3: why$"):
        peers_processes.program([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


@pytest.mark.parametrize("bits", [2.25, 4.25])
def test_random_codes_take_the_bits_that_were_asked_for(bench: None, bits: float) -> None:
    import runtime

    found = runtime.coded("matrix", (1024, 512), bits)
    assert 8 * found.nbytes / (1024 * 512) == pytest.approx(bits, abs=0.02)


@pytest.mark.skipif(not kernels.NATIVE, reason="the native kernels are not built")
def test_every_form_of_the_roofline_is_the_matrix_that_it_says(bench: None) -> None:
    import roofline

    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    bits = {}
    for name, form in roofline.FORMS.items():
        matrix = form.make(64, 256)
        weight = torch.stack([matrix.row(row) for row in range(64)])
        roofline.Turning(matrix, []).product(kernels.LEVELS[-1], 1, 4)()
        wanted = x @ weight.T
        assert (matrix.linear(x) - wanted).norm() < 0.03 * wanted.norm(), name
        bits[name] = 8 * matrix.nbytes / weight.numel()
    assert bits["dense bfloat16"] == 16 and bits["half bfloat16"] == pytest.approx(9, abs=0.2)
    assert bits["codes of 2 bits"] < bits["codes of 3 bits"] < bits["codes of 4 bits"] < 5.5
