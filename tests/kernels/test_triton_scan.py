"""The selective scan in Triton, in its interpreter on the CPU, against the reference in float64.

The interpreter takes a millisecond for a step of a program, so shapes are small; they cross the borders of
tiles (32 channels) and of chunks of kept states (16 steps). Borders that lie farther apart are set closer.
"""

from __future__ import annotations

from typing import Any

import forms
import pytest
import torch

programs: Any = pytest.importorskip("sparsessm.kernels.gpu.programs", reason="the extra `gpu` is missing")
from sparsessm.kernels.gpu import scan, stats, tiles  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 19, 33, 5), (3, 7, 3, 16), (1, 4, 2, 64), (1, 3, 9, 200), (2, 0, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_scan(shape: tuple[int, ...], gate: bool, started: bool) -> None:
    forms.assert_scan(programs, forms.scan_inputs(shape, torch.float32, gate, started), 1e-5)


@pytest.mark.parametrize(("shape", "pieces"), [((2, 21, 3, 4), 5), ((1, 9, 1, 2), 2), ((1, 40, 2, 1), 10)])
@pytest.mark.parametrize("started", [True, False])
def test_long_sequences_are_cut_into_pieces(
    shape: tuple[int, ...], pieces: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SHORTEST", 4)
    assert scan.cut(*shape[:3])[0] == pieces
    forms.assert_scan(programs, forms.scan_inputs(shape, torch.float32, True, started), 1e-5)


def test_pieces_hold_all_steps() -> None:
    for batch, length, channels in ((1, 2048, 1536), (128, 16, 1536), (1, 1000, 1), (1, 127, 1), (3, 1, 1)):
        pieces, span = scan.cut(batch, length, channels)
        assert (pieces - 1) * span < length <= pieces * span
    assert scan.cut(128, 16, 1536) == (1, 16) and scan.cut(1, 0, 1) == (1, 1)


@pytest.mark.parametrize("shape", [*SHAPES[:4], (1, 35, 1, 3)])
@pytest.mark.parametrize("gate", [True, False])
def test_backward(shape: tuple[int, ...], gate: bool) -> None:
    forms.assert_backward(programs, forms.scan_inputs(shape, torch.float32, gate, gate), 1e-5)


def test_backward_of_an_empty_sequence() -> None:
    x = forms.scan_inputs((2, 0, 3, 2), torch.float32)
    du, _, dA, dB, _, dD, _ = programs.selective_scan_backward(x[0], *x)
    assert du.shape == (2, 0, 3) and dB.shape == (2, 0, 2) and not dA.any() and not dD.any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 33, 5), (9, 2, 3, 16), (1, 2, 2, 64), (1, 2, 3, 100)])
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
@pytest.mark.parametrize("gram", ["full", "diagonal"])
def test_stats(shape: tuple[int, ...], removed: str, gram: str) -> None:
    gate = removed == "unit"
    x = forms.scan_inputs(shape, torch.float32, gate, started=gram == "full")
    forms.assert_stats(programs, x, 1e-5, removed=removed, gram=gram, energy=True)


def test_sums_of_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 over float32 sums of at most so many steps, across sequences."""
    monkeypatch.setattr(stats, "SUMMED", 8)
    for gram in ("full", "diagonal"):
        x = forms.scan_inputs((2, 13, 2, 3), torch.float32)
        forms.assert_stats(programs, x, 1e-5, removed="unit", gram=gram, energy=False)
    forms.assert_stats(programs, x, 1e-5, removed="unit", gram=None, energy=True)


def test_partial_sums_of_rounds_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sequences make, here with few."""
    monkeypatch.setattr(stats, "TOGETHER", 2)
    monkeypatch.setattr(stats, "ROUND", 2)
    monkeypatch.setattr(stats, "RUNS", 2)
    x = forms.scan_inputs((5, 3, 3, 4), torch.float32)
    for gram in ("full", "diagonal"):
        forms.assert_stats(programs, x, 1e-5, removed="unit", gram=gram, energy=True)
    monkeypatch.setattr(stats, "PARTIAL", 1)
    monkeypatch.setattr(stats, "ROOM", 1)
    forms.assert_stats(programs, x, 1e-5, removed="memoryless", gram="full", energy=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a sigmoid that is then zero
def test_what_holds_of_any_form() -> None:
    forms.assert_slabs_are_one_pass(programs, 21, 8)
    forms.assert_memoryless_is_exact(programs)
    forms.assert_extremes_stay_finite_and_nan_shows(programs)


def test_the_same_inputs_give_the_same_bits() -> None:
    for one, again in zip(forms.everything(programs), forms.everything(programs), strict=True):
        assert torch.equal(one, again)


def test_half_precision_is_read_as_it_is() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = forms.scan_inputs((2, 9, 5, 6), dtype)
        x[2] = x[2].clamp(min=-1e3)
        forms.assert_scan(programs, x, 5e-3)
        assert programs.selective_scan_backward(*x[:1], *x)[0].dtype == torch.float32


def test_views_are_not_copied() -> None:
    u, *_ = forms.scan_inputs((2, 9, 5, 6), torch.bfloat16)
    assert not u.is_contiguous() and tiles.rows(u).data_ptr() == u.data_ptr()
    assert tiles.rows(u.mT.contiguous().mT).is_contiguous()


@pytest.mark.parametrize("states", [1, 2, 5, 16, 17, 64, 128, 256])
def test_tiles_hold_all_states(states: int) -> None:
    for each in (8, 16):
        held, channels, warps = tiles.tile(states, each)
        assert states <= held < 2 * states and 8 <= channels <= 32 and 1 <= warps <= 8
        assert held * channels <= 32 * warps * each or channels == 8
