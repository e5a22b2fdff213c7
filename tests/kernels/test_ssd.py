"""Mamba-2's scan at every level, against the plain recurrence in float64 on hostile shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.kernels import reference
from sparsessm.kernels.ssd import ssd_scan

Shape = tuple[int, int, int, int, int, int]  # W, T, H, P, G, N
SHAPES: list[Shape] = [
    (1, 1, 1, 1, 1, 1),
    (2, 33, 6, 70, 3, 129),
    (1, 48, 4, 64, 1, 64),
    (2, 50, 4, 24, 4, 7),
]


def inputs(shape: Shape, seed: int = 0) -> list[Any]:
    """u, delta, A, B, C, D, initial_state in float32; u, B and C are slices of one tensor as in the model."""
    W, T, H, P, G, N = shape
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(W, T, H * P + 2 * G * N, generator=g)
    u, B, C = wide.split([H * P, G * N, G * N], -1)
    delta = F.softplus(torch.randn(W, T, 2 * H, generator=g) - 2)[..., H:]
    A = -torch.exp(2.8 * torch.rand(H, generator=g))
    B, C = B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    D, state = torch.randn(H, generator=g), torch.randn(W, H, P, N, generator=g)
    return [u.unflatten(2, (H, P)), delta, A, B, C, D, state]


def plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, state: Any = None) -> Any:
    """y, and the state after every step, (W, T, H, P, N): float64, head by head."""
    (W, T, H, P), (G, N) = u.shape, B.shape[2:]
    y, states = torch.zeros(W, T, H, P).double(), torch.zeros(W, T, H, P, N).double()
    for h in range(H):
        group = h // (H // G)
        now = torch.zeros(W, P, N).double() if state is None else state[:, h].double()
        for t in range(T):
            step, x, b, c = (z.double() for z in (delta[:, t, h], u[:, t, h], B[:, t, group], C[:, t, group]))
            decay = torch.exp(step * A[h].double())
            now = decay[:, None, None] * now + torch.einsum("w,wp,wn->wpn", step, x, b)
            y[:, t, h] = torch.einsum("wpn,wn->wp", now, c) + (0 if D is None else D[h].double() * x)
            states[:, t, h] = now
    return y, states


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30)


def assert_scans(x: list[Any], every: int) -> None:
    y, last, *sampled = ssd_scan(*x, every=every)
    want, states = plain(*x)
    assert last.dtype == torch.float32 and y.shape == want.shape
    # y is a sum whose terms may cancel: its error is one of them, which all of one sign show
    terms, _ = plain(*(z if z is None else z if i in (1, 2) else z.abs() for i, z in enumerate(x)))
    assert ((y.double() - want).abs() <= 1e-5 * terms).all()
    final = (
        states[:, -1] if states.shape[1] else states.new_zeros(last.shape) if x[6] is None else x[6].double()
    )
    assert_close(last, final)
    assert len(sampled) == bool(every)
    if every:
        assert_close(sampled[0], states[:, every - 1 :: every])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("every", [0, 1, 5, 16, 100])
def test_scan(any_level: str, shape: Shape, every: int) -> None:
    assert_scans(inputs(shape), every)


@pytest.mark.parametrize("name", kernels.LEVELS)
@settings(deadline=None, max_examples=60)
@given(
    windows=st.integers(1, 2),
    length=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    ratio=st.integers(1, 3),
    channels=st.integers(1, 70),
    groups=st.integers(1, 3),
    states=st.integers(1, 130),
    every=st.integers(0, 40),
    skip=st.booleans(),
    started=st.booleans(),
    memoryless=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_hostile_shapes(
    name: str,
    windows: int,
    length: int,
    ratio: int,
    channels: int,
    groups: int,
    states: int,
    every: int,
    skip: bool,
    started: bool,
    memoryless: bool,
    seed: int,
) -> None:
    x = inputs((windows, length, groups * ratio, channels, groups, states), seed)
    x[5], x[6] = x[5] if skip else None, x[6] if started else None
    if memoryless:
        x[2][-1] = -3e16
        x[1][:, ::3, -1] = 0.0
    with pytest.MonkeyPatch.context() as patch:  # hypothesis and a function's fixtures do not mix
        patch.setattr(kernels, "LEVEL", name)
        assert_scans(x, every)


def test_memoryless_heads_forget_exactly(any_level: str) -> None:
    x = inputs((2, 37, 4, 9, 2, 5))
    x[2][1] = -3e16
    x[1][:, 20, 1] = 0.0  # a step of no length keeps all
    x[1][:, 21, 1] = 1e-17  # a third of the state is gone; a sum of exponents of 1e16 would not see it
    _, last, states = ssd_scan(*x, every=1)
    entering = x[1][:, :, 1, None, None] * x[0][:, :, 1, :, None] * x[3][:, :, 0, None, :]
    torch.testing.assert_close(last[:, 1], entering[:, -1])
    torch.testing.assert_close(states[:, 20, 1], states[:, 19, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(states[:, 21, 1], states[:, 20, 1] * torch.exp(torch.tensor(-0.3)))


def test_extremes_stay_finite_and_nan_shows(any_level: str) -> None:
    x = inputs((1, 40, 2, 18, 1, 3))
    x[1][0, 3], x[1][0, 4] = 0.0, 80.0
    assert_scans(x, 0)
    for tensor, at in ((x[0], (0, 21, 1, 2)), (x[3], (0, 21, 0, 1)), (x[1], (0, 21, 1))):
        before = tensor[at].item()
        tensor[at] = torch.nan
        y = ssd_scan(*x)[0]
        assert y[0, 21:, 1, 2].isnan().all() and not y[0, :21].isnan().any()  # nor a step earlier
        tensor[at] = before
    x[0][0, 21, 1, 2] = torch.nan
    assert not ssd_scan(*x)[0][0, :, :, 3].isnan().any()


def test_slabs_of_time_equal_one_pass(any_level: str) -> None:
    x = inputs((2, 50, 4, 20, 2, 11))
    whole, end, states = ssd_scan(*x, every=2)
    for split in (1, 16, 32, 34, 49):
        first = [t[:, :split] if i in (0, 1, 3, 4) else t for i, t in enumerate(x)]
        second = [t[:, split:] if i in (0, 1, 3, 4) else t for i, t in enumerate(x)]
        y, second[6], a = ssd_scan(*first, every=2)
        z, last, b = ssd_scan(*second, every=2)
        assert_close(torch.cat([y, z], 1), whole.double())
        assert_close(last, end.double())
        if split % 2 == 0:
            assert_close(torch.cat([a, b], 1), states.double())
        if split % 16 == 0 and any_level != "reference":  # whole chunks: not a bit changes
            assert torch.equal(torch.cat([y, z], 1), whole) and torch.equal(last, end)


def test_sampling_changes_no_other_bit(any_level: str) -> None:
    x = inputs((2, 50, 4, 20, 2, 11))
    want = ssd_scan(*x)
    for every in (1, 7, 16, 51):
        assert all(torch.equal(a, b) for a, b in zip(want, ssd_scan(*x, every=every)[:2], strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(any_level: str, threads: int) -> None:
    x = inputs((2, 100, 6, 33, 2, 40))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ssd_scan(*x, every=9)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, ssd_scan(*x, every=9), strict=True))
    finally:
        torch.set_num_threads(before)


def test_views_and_half_precision(any_level: str) -> None:
    x = inputs((2, 19, 4, 24, 2, 6))
    want = ssd_scan(*x)[0]
    assert not x[0].is_contiguous() and not x[1].is_contiguous()
    strange = [
        t.transpose(1, -1).contiguous().transpose(1, -1) if i in (0, 1, 3, 4) else t for i, t in enumerate(x)
    ]
    assert strange[0].stride(-1) != 1 and strange[1].stride(-1) != 1
    assert torch.equal(ssd_scan(*strange)[0], want)
    assert torch.equal(ssd_scan(*(t.contiguous() for t in x))[0], want)
    y, last = ssd_scan(*(t.bfloat16() for t in x))
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    exact = plain(*(t.bfloat16() for t in x))
    assert_close(y, exact[0], 1e-2)
    assert_close(last, exact[1][:, -1])


@pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")
def test_slices_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = inputs((2, 19, 4, 24, 2, 6)), []
    native = kernels.extension()

    class Spy:
        def ssd_scan(self, *given: Any) -> None:
            seen.extend(t.data_ptr() for t in given if isinstance(t, Tensor))
            native.ssd_scan(*given)

    monkeypatch.setattr(kernels, "_native", Spy())
    ssd_scan(*x)
    assert {t.data_ptr() for t in x} <= set(seen)


def test_double_runs_in_the_reference() -> None:
    x = [t.double() for t in inputs((2, 19, 4, 5, 2, 6))]
    y, last, states = ssd_scan(*x, every=4)
    assert y.dtype == last.dtype == states.dtype == torch.float64
    assert torch.equal(y, reference.ssd_scan(*x)[0])
    assert_close(y, plain(*x)[0], 1e-14)


@pytest.mark.parametrize("index,name", [(1, "delta"), (2, "A"), (4, "C"), (5, "D"), (6, "initial_state")])
def test_wrong_shapes_are_named(index: int, name: str) -> None:
    x = inputs((2, 6, 4, 5, 2, 3))
    x[index] = x[index][..., :-1]
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        ssd_scan(*x)


def test_what_does_not_fit_is_named() -> None:
    x = inputs((2, 6, 4, 5, 2, 3))
    for index, value, message in (
        (0, x[0].flatten(2), "^u has shape .* expected"),
        (0, x[0].long(), "^u is torch.int64"),
        (0, x[0][:, :, :, :0], "^u has shape .* at least 1"),
        (3, x[3][:, :, :0], "^4 heads do not divide into 0 groups of B"),
        (3, x[3][:, :, [0, 1, 1]], "^4 heads do not divide into 3 groups of B"),
        (3, x[3][:, :5], "^B has shape"),
        (3, x[3][..., :0], "^B has no states"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd_scan(*[value if i == index else t for i, t in enumerate(x)])
    with pytest.raises(ValueError, match="^every is -1"):
        ssd_scan(*x, every=-1)


@pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")
def test_the_binding_checks_shapes_itself() -> None:
    u, delta, A, B, C, D, state = inputs((2, 6, 4, 5, 2, 3))
    y, last, states = torch.empty(2, 6, 20), torch.empty(2, 4, 5, 3), torch.empty(2, 3, 4, 5, 3)
    given: dict[str, Any] = {"level": "portable", "threads": 1, "u": u.flatten(2), "delta": delta, "A": A}
    given |= {"B": B.flatten(2), "C": C.flatten(2), "groups": 2, "D": D, "initial_state": state}
    given |= {"y": y, "last_state": last, "states": states, "every": 2}
    run = kernels.extension().ssd_scan
    run(**given)
    for change, message in (
        ({"y": y[:, 1:]}, "y: dimension 1 is 5, expected 6"),
        ({"groups": 0}, "whole groups"),
        ({"groups": 4}, "B of states for each group"),
        ({"A": A[:3]}, "whole heads"),
        ({"every": 0}, "every is 0"),
        ({"every": 1}, "states: dimension 1 is 3, expected 6"),
        (
            {"delta": delta.transpose(1, 2).contiguous().transpose(1, 2)},
            "delta: dimension 2 is not contiguous",
        ),
        ({"D": D[1:]}, "D: dimension 0 is 3, expected 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{**given, **change})


@pytest.mark.parametrize("index", range(6))
def test_gradients_flow(any_level: str, index: int) -> None:
    x = inputs((2, 21, 4, 5, 2, 6))
    dy = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for run, dtype in ((ssd_scan, torch.float32), (reference.ssd_scan, torch.float64)):
        cast = [t.detach().to(dtype, copy=True) for t in x]
        cast[index].requires_grad_()
        run(*cast)[0].backward(dy.to(dtype))
        grads.append(cast[index].grad)
    assert_close(*grads, tolerance=2e-5)


def test_where_no_gradient_flows(any_level: str) -> None:
    x = inputs((2, 21, 4, 5, 2, 6))
    assert ssd_scan(*x)[0].grad_fn is None
    x[0] = x[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="^every: no gradient"):
        ssd_scan(*x, every=4)
    with torch.no_grad():
        assert ssd_scan(*x, every=4)[0].grad_fn is None
    x[6].requires_grad_()
    with pytest.raises(ValueError, match="^initial_state requires a gradient"):
        ssd_scan(*x)
