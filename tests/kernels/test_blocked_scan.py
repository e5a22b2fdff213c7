"""kernels/blocked.py against the reference in float64, on hostile shapes; and the door on a second device."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import forms
import pytest
import torch
from elsewhere import DEVICE, Remote, elsewhere

from sparsessm import kernels
from sparsessm.kernels import blocked, gpu, reference
from sparsessm.kernels.ssd import ssd_scan

SHAPES = [(1, 1, 1, 1), (2, 37, 21, 5), (3, 16, 3, 16), (1, 130, 2, 64), (2, 5, 7, 256), (2, 0, 3, 2)]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-11)]
FUNCTIONS = [
    "selective_scan", "selective_scan_stats", "selective_scan_backward",
    "causal_conv1d", "causal_conv1d_backward", "ssd_scan",
]  # fmt: skip


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 steps."""
    monkeypatch.setattr(blocked, "LONGEST", 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_scan(
    shape: tuple[int, ...], gate: bool, started: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x = forms.scan_inputs(shape, dtype, gate, started)
    forms.assert_scan(blocked, x, tolerance)
    if shape[1]:
        forms.assert_backward(blocked, x, tolerance)


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
@pytest.mark.parametrize("gram", ["full", "diagonal", None])
@pytest.mark.parametrize("energy", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_stats(shape: tuple[int, ...], removed: str, gram: str | None, energy: bool, started: bool) -> None:
    for dtype, tolerance in PRECISIONS:
        x = forms.scan_inputs(shape, dtype, gate=energy, started=started)
        forms.assert_stats(blocked, x, tolerance, removed=removed, gram=gram, energy=energy)


@pytest.mark.parametrize("every", [0, 1, 5, 16, 100])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_ssd(every: int, started: bool, dtype: torch.dtype, tolerance: float) -> None:
    for shape in ((1, 1, 1, 1, 1, 1), (2, 33, 6, 7, 3, 9), (1, 140, 2, 3, 2, 5), (2, 0, 2, 3, 1, 2)):
        forms.assert_ssd(blocked, forms.ssd_inputs(shape, dtype, started), tolerance, every)


def test_what_holds_of_any_form() -> None:
    forms.assert_slabs_are_one_pass(blocked, 75, 11)
    forms.assert_memoryless_is_exact(blocked)
    forms.assert_extremes_stay_finite_and_nan_shows(blocked)
    for one, again in zip(forms.everything(blocked), forms.everything(blocked), strict=True):
        assert torch.equal(one, again)


def test_half_precision_is_computed_in_float32() -> None:
    forms.assert_scan(blocked, forms.scan_inputs((2, 19, 5, 6), torch.bfloat16), 5e-3)
    forms.assert_ssd(blocked, forms.ssd_inputs((2, 19, 2, 5, 1, 6), torch.bfloat16), 5e-3, 4)
    forms.assert_conv(blocked, forms.conv_inputs((2, 9, 5), 4, torch.float16, True, True), 1e-3, silu=True)
    _, last = blocked.selective_scan(*forms.scan_inputs((2, 19, 5, 6), torch.float16))
    assert last.dtype == torch.float32


def test_blocks_of_their_usual_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "LONGEST", 64)
    for length in (1, 63, 64, 65, 150):
        x = forms.scan_inputs((2, length, 3, 4), torch.float64)
        forms.assert_scan(blocked, x, 1e-11)
        forms.assert_backward(blocked, x, 1e-11)
        forms.assert_stats(blocked, x, 1e-11, removed="unit", gram="full", energy=True)


def test_large_states_make_short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "LONGEST", 64)
    monkeypatch.setattr(blocked, "NUMBERS", 1)
    forms.assert_scan(blocked, forms.scan_inputs((2, 21, 3, 4), torch.float64), 1e-11)
    forms.assert_ssd(blocked, forms.ssd_inputs((2, 21, 2, 3, 1, 4), torch.float64), 1e-11, 2)


# The door.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forms_take_the_same_arguments(name: str) -> None:
    wanted = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(blocked, name)) == wanted
    if made := gpu.compiled():
        assert inspect.signature(getattr(made, name)) == wanted


def test_which_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, dtype: torch.dtype) -> Any:
        return gpu.form(SimpleNamespace(device=torch.device(device), dtype=dtype))  # type: ignore[arg-type]

    made = SimpleNamespace()
    monkeypatch.setattr(gpu, "compiled", lambda: made)
    assert chosen("cuda", torch.float32) is chosen("cuda:1", torch.bfloat16) is made
    assert chosen("cuda", torch.float64) is chosen("mps", torch.float32) is blocked
    monkeypatch.setattr(gpu, "compiled", lambda: None)  # Triton is not installed
    assert chosen("cuda", torch.float32) is blocked


def moved(x: Any) -> Any:
    return Remote(x) if isinstance(x, torch.Tensor) else x


def flat(results: Any) -> list[torch.Tensor]:
    parts = results if isinstance(results, tuple) else (results,)
    return [
        one for part in parts for one in (part if isinstance(part, tuple) else (part,)) if one is not None
    ]


def test_results_of_the_door_lie_on_the_device_of_its_inputs() -> None:
    scan = forms.scan_inputs((2, 19, 5, 3), torch.float32)
    conv = forms.conv_inputs((2, 19, 5), 4, torch.float32, True, True)
    stats: dict[str, Any] = {"removed": "unit", "energy": True, "gram": "full"}
    for name, door, x, options in (
        ("selective_scan", kernels.selective_scan, scan, {}),
        ("selective_scan_stats", kernels.selective_scan_stats, scan, stats),
        ("selective_scan_backward", kernels.selective_scan_backward, [scan[0], *scan], {}),
        ("causal_conv1d", kernels.causal_conv1d, conv, {"silu": True}),
        ("causal_conv1d_backward", kernels.causal_conv1d_backward, [conv[0], *conv], {"silu": True}),
        ("ssd_scan", ssd_scan, forms.ssd_inputs((2, 19, 2, 3, 1, 4), torch.float32), {"every": 3}),
    ):
        wanted = flat(getattr(blocked, name)(*x, **options))
        with elsewhere():
            got = flat(door(*map(moved, x), **options))
            assert all(one.device == DEVICE for one in got), name
            forms.assert_same([one.to("cpu") for one in got], [one.double() for one in wanted], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_through_the_door(dtype: torch.dtype) -> None:
    *scan, state = forms.scan_inputs((2, 19, 5, 3), dtype)
    *conv, before = forms.conv_inputs((2, 19, 5), 4, dtype, True, True)
    for run, definition, x in (
        (
            lambda *given: kernels.selective_scan(*given, moved(state))[0],
            lambda *given: reference.selective_scan(*given, state.double())[0],
            scan,
        ),
        (
            lambda *given: kernels.causal_conv1d(*given, moved(before), silu=True),
            lambda *given: reference.causal_conv1d(*given, before.double(), silu=True),
            conv,
        ),
    ):
        exact = [one.detach().double().requires_grad_() for one in x]
        wanted = torch.autograd.grad(definition(*exact).square().sum(), exact)
        with elsewhere():
            own = [moved(one.detach().clone()).requires_grad_() for one in x]
            got = torch.autograd.grad(run(*own).square().sum(), own)
            assert all(one.device == DEVICE and one.dtype == dtype for one in got)
            here = [one.to("cpu") for one in got]
        forms.assert_same(here, wanted, 1e-5 if dtype == torch.float32 else 1e-10)


def test_no_gradient_flows_through_the_last_state() -> None:
    x = [moved(one) for one in forms.scan_inputs((1, 4, 2, 3), torch.float32)]
    with elsewhere():
        x[0].requires_grad_()
        with pytest.raises(ValueError, match="no gradient flows through the last state"):
            kernels.selective_scan(*x)[1].sum().backward()
