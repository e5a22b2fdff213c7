"""The native kernels against the float64 reference, at every level this CPU has, on random and on hostile
shapes."""

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

SHAPES = [(1, 1, 1, 1), (2, 37, 21, 5), (3, 16, 16, 16), (1, 33, 130, 17), (2, 5, 7, 256), (1, 100, 64, 8)]
NATIVE_LEVELS = kernels.LEVELS[1:]
pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")


@pytest.fixture(params=NATIVE_LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "LEVEL", request.param)
    return request.param


def inputs(batch: int, length: int, channels: int, states: int, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, z, initial_state in float32."""
    g = torch.Generator().manual_seed(seed)
    delta = F.softplus(torch.randn(batch, length, channels, generator=g) - 2)
    return [
        torch.randn(batch, length, channels, generator=g),
        delta,
        -torch.exp(torch.randn(channels, states, generator=g)),
        torch.randn(batch, length, states, generator=g),
        torch.randn(batch, length, states, generator=g),
        torch.randn(channels, generator=g),
        torch.randn(batch, length, channels, generator=g),
        torch.randn(batch, channels, states, generator=g),
    ]


def assert_close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-5) -> None:
    if want is None:
        assert got is None
        return
    assert got is not None and got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
def test_scan(level: str, shape: tuple[int, int, int, int], gate: bool) -> None:
    x = inputs(*shape)
    z = x[6] if gate else None
    y, last = kernels.selective_scan(*x[:6], z, x[7])
    want_y, want_last = reference.selective_scan(
        *(t.double() for t in x[:6]), None if z is None else z.double(), x[7].double()
    )
    assert_close(y, want_y)
    assert_close(last, want_last)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
@pytest.mark.parametrize("gram", ["full", "diagonal", None])
@pytest.mark.parametrize("energy", [True, False])
def test_stats(
    level: str, shape: tuple[int, int, int, int], removed: str, gram: str | None, energy: bool
) -> None:
    x = inputs(*shape)
    before = x[7] * 0.5
    got = kernels.selective_scan_stats(*x, removed=removed, energy=energy, gram=gram, removed_state=before)
    want = reference.selective_scan_stats(
        *(t.double() for t in x), removed=removed, energy=energy, gram=gram, removed_state=before.double()
    )
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
def test_backward(level: str, shape: tuple[int, int, int, int], gate: bool) -> None:
    x = inputs(*shape)
    z = x[6] if gate else None
    dy = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1))
    got = kernels.selective_scan_backward(dy, *x[:6], z, x[7])
    want = reference.selective_scan_backward(
        dy.double(), *(t.double() for t in x[:6]), None if z is None else z.double(), x[7].double()
    )
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 21), (1, 2, 130)])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv1d(level: str, shape: tuple[int, int, int], width: int, silu: bool) -> None:
    """Against torch's own convolution, padded on the left."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in (shape, (shape[2], width), (shape[2],)))
    before = torch.randn(shape[0], width - 1, shape[2], generator=g)
    for past in (before, None):
        padded = torch.cat([torch.zeros_like(before) if past is None else past, x], 1).double()
        want = F.conv1d(padded.transpose(1, 2), weight.double()[:, None], bias.double(), groups=shape[2])
        want = (F.silu(want) if silu else want).transpose(1, 2)
        assert_close(kernels.causal_conv1d(x, weight, bias, past, silu=silu), want)
        assert_close(reference.causal_conv1d(x, weight, bias, past, silu=silu), want)
    with pytest.raises(ValueError, match="^before has shape"):
        kernels.causal_conv1d(x, weight, bias, torch.zeros(shape[0], width, shape[2]))


def test_reference_backward_is_the_gradient() -> None:
    x = [t.double().requires_grad_() for t in inputs(1, 6, 3, 2)]
    assert torch.autograd.gradcheck(lambda *args: reference.selective_scan(*args)[0], x)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    channels=st.integers(1, 40),
    states=st.integers(1, 20),
    split=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_slabs_of_time_equal_one_pass(
    batch: int, length: int, channels: int, states: int, split: int, seed: int
) -> None:
    x = inputs(batch, length, channels, states, seed)
    split = min(split, length)
    options = {"removed": "unit", "energy": True, "gram": "full"}
    whole = kernels.selective_scan_stats(*x[:7], None, **options)
    parts, state, other = [], None, None
    for span in (slice(0, split), slice(split, length)):
        if span.start == span.stop:
            continue
        cut = [t[:, span] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(x[:7])]
        y, state, stats = kernels.selective_scan_stats(*cut, state, removed_state=other, **options)
        other = stats.removed_state
        parts.append((y, stats))
    assert_close(torch.cat([y for y, _ in parts], 1), whole[0].double())
    assert_close(state, whole[1].double())
    assert_close(torch.cat([s.energy for _, s in parts]), whole[2].energy.double())
    assert_close(sum(s.gram for _, s in parts), whole[2].gram)
    assert_close(other, whole[2].removed_state.double())


def test_memoryless_entries_forget_exactly(level: str) -> None:
    x = inputs(1, 50, 20, 4)
    x[2][:, 1] = -torch.exp(torch.tensor(38.0))
    _, last = kernels.selective_scan(*x[:6], None, x[7])
    step = x[1][:, -1] * x[0][:, -1]  # delta u of the last token
    torch.testing.assert_close(last[:, :, 1], step * x[3][:, -1, 1:2])


def test_extremes_stay_finite_and_nan_shows(level: str) -> None:
    x = inputs(1, 20, 18, 3)
    x[1][0, 3] = 0.0
    x[1][0, 4] = 80.0
    x[6][0, 5], x[6][0, 6] = 200.0, -200.0
    y, _ = kernels.selective_scan(*x)
    assert_close(y, reference.selective_scan(*(t.double() for t in x))[0])
    x[0][0, 7, 2] = torch.nan
    y, _ = kernels.selective_scan(*x)
    assert y[0, 7:, 2].isnan().all() and not y[0, :, 3].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    x = inputs(2, 60, 200, 9)
    dy = torch.ones_like(x[0])
    before = torch.get_num_threads()
    one = _everything(x, dy, 1)
    try:
        for a, b in zip(one, _everything(x, dy, threads), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def _everything(x: list[Tensor], dy: Tensor, threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    y, last, stats = kernels.selective_scan_stats(*x, removed="unit", energy=True, gram="full")
    return [*kernels.selective_scan(*x), y, last, *stats, *kernels.selective_scan_backward(dy, *x)]


def test_views_and_half_precision(level: str) -> None:
    x = inputs(2, 19, 24, 6)
    want = kernels.selective_scan(*x)[0]
    wide = torch.cat([x[0], x[6]], -1)
    u, z = wide.chunk(2, -1)
    transposed = x[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not u.is_contiguous() and transposed.stride(-1) != 1
    assert torch.equal(kernels.selective_scan(u, transposed, *x[2:6], z, x[7])[0], want)
    half = kernels.selective_scan(*(t.bfloat16() for t in x))[0]
    assert half.dtype == torch.bfloat16
    assert_close(half, want.double(), 5e-2)


def test_empty_sequence(level: str) -> None:
    x = inputs(2, 3, 5, 4)
    y, last = kernels.selective_scan(*(t[:, :0] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(x)))
    assert y.shape == (2, 0, 5) and torch.equal(last, x[7])


@pytest.mark.parametrize(
    "index,name", [(1, "delta"), (3, "B"), (4, "C"), (5, "D"), (6, "z"), (7, "initial_state")]
)
def test_wrong_shapes_are_named(index: int, name: str) -> None:
    x = inputs(2, 6, 5, 4)
    x[index] = x[index][..., :-1]
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        kernels.selective_scan(*x)


def test_the_binding_checks_shapes_itself() -> None:
    from sparsessm.kernels import _native

    x = inputs(2, 6, 5, 4)
    with pytest.raises(ValueError, match="y: dimension 1 is 5, expected 6"):
        _native.selective_scan("portable", 1, *x, torch.empty(2, 5, 5), torch.empty(2, 5, 4))
    with pytest.raises(ValueError, match="u: dimension 2 is not contiguous"):
        args = [x[0].transpose(1, 2).contiguous().transpose(1, 2), *x[1:]]
        _native.selective_scan("portable", 1, *args, torch.empty(2, 6, 5), torch.empty(2, 5, 4))
    with pytest.raises(ValueError, match="does not support the kernel level 'abacus'"):
        _native.selective_scan("abacus", 1, *x, torch.empty(2, 6, 5), torch.empty(2, 5, 4))


def test_native_gram_is_exact_channel_by_channel(level: str) -> None:
    """Weak channels too: each channel against its own maximum, over ten decades of input."""
    x = inputs(2, 70, 33, 6)
    x[0] *= torch.logspace(-5, 5, 33)
    for removed in ("memoryless", "unit"):
        options: dict[str, str] = {"removed": removed, "gram": "full"}
        got = kernels.selective_scan_stats(*x[:7], None, **options)[2]
        want = reference.selective_scan_stats(*(t.double() for t in x[:7]), None, **options)[2]
        for a, b in ((got.gram, want.gram), (got.cross, want.cross), (got.power, want.power)):
            error, scale = ((t.abs().view(33, -1)).amax(1) for t in (a - b, b))
            assert (error <= 1e-5 * scale).all()


def test_the_binding_refuses_another_dtype() -> None:
    from sparsessm.kernels import _native

    x = inputs(1, 4, 5, 3)
    with pytest.raises(TypeError):
        _native.selective_scan("portable", 1, *x, torch.empty(1, 4, 5).double(), torch.empty(1, 5, 3))


@pytest.mark.parametrize("batch,channels", [(0, 3), (2, 0)])
def test_empty_batch_and_no_channels_are_refused(batch: int, channels: int) -> None:
    with pytest.raises(ValueError, match="batch and D must be at least 1"):
        kernels.selective_scan_stats(*inputs(batch, 4, channels, 2), energy=True, gram="full")


def test_integers_are_refused() -> None:
    x = inputs(1, 4, 3, 2)
    with pytest.raises(ValueError, match="u is torch.int64"):
        kernels.selective_scan(x[0].long(), *x[1:])
    with pytest.raises(ValueError, match="x has shape"):
        kernels.causal_conv1d(x[0][0], torch.ones(3, 4))


def test_backward_of_an_empty_sequence(level: str) -> None:
    x = [t[:, :0] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs(2, 3, 5, 4))]
    du, _, dA, _, _, dD, _ = kernels.selective_scan_backward(torch.zeros(2, 0, 5), *x)
    assert du.shape == (2, 0, 5) and (dA == 0).all() and (dD == 0).all()


def test_options_are_checked() -> None:
    x = inputs(1, 2, 3, 2)
    with pytest.raises(ValueError, match="removed is 'gone'"):
        kernels.selective_scan_stats(*x, removed="gone")
    with pytest.raises(ValueError, match="gram is 'half'"):
        kernels.selective_scan_stats(*x, gram="half")
    with pytest.raises(ValueError, match="A has 257 states"):
        kernels.selective_scan(*inputs(1, 1, 1, 257))


def test_double_runs_in_the_reference() -> None:
    x = [t.double() for t in inputs(1, 9, 4, 3)]
    assert torch.equal(kernels.selective_scan(*x)[0], reference.selective_scan(*x)[0])


GRADIENT_SHAPES = [*SHAPES[:4], (2, 1, 5, 3), (2, 9, 6, 1)]
CONV_SHAPES = [(1, 1, 1), (2, 37, 21), (3, 2, 130)]


@pytest.fixture(params=kernels.LEVELS)
def any_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "LEVEL", request.param)
    return request.param


def conv_inputs(shape: tuple[int, int, int], width: int) -> list[Tensor]:
    """x, weight, bias, before in float32."""
    g = torch.Generator().manual_seed(0)
    shapes = (shape, (shape[2], width), (shape[2],), (shape[0], width - 1, shape[2]))
    return [torch.randn(*s, generator=g) for s in shapes]


def leaves(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def assert_same_gradients(run: Any, definition: Any, tensors: list[Tensor | None]) -> None:
    """Of `run` in float32 and of its definition in float64, at a random gradient of the output."""
    got, want = leaves(tensors, torch.float32), leaves(tensors, torch.float64)
    y, exact = run(*got), definition(*want)
    assert y.requires_grad
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    exact.backward(dy.double())
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            assert a.grad is not None and a.grad.dtype == torch.float32
            assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_the_scan_is_differentiable(
    any_level: str, shape: tuple[int, int, int, int], gate: bool, started: bool
) -> None:
    *x, state = inputs(*shape)
    assert_same_gradients(
        lambda *t: kernels.selective_scan(*t, state if started else None)[0],
        lambda *t: reference.selective_scan(*t, state.double() if started else None)[0],
        [*x[:6], x[6] if gate else None],
    )


@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_the_convolution_is_differentiable(
    any_level: str, shape: tuple[int, int, int], width: int, silu: bool, biased: bool, started: bool
) -> None:
    x, weight, bias, before = conv_inputs(shape, width)
    assert_same_gradients(
        lambda *t: kernels.causal_conv1d(*t, before if started else None, silu=silu),
        lambda *t: reference.causal_conv1d(*t, before.double() if started else None, silu=silu),
        [x, weight, bias if biased else None],
    )


def test_gradcheck_in_double() -> None:
    *x, state = (t.double().requires_grad_() for t in inputs(1, 5, 3, 2))
    state = state.detach()
    assert torch.autograd.gradcheck(lambda *t: kernels.selective_scan(*t, state)[0], x)
    for width, silu in ((1, True), (4, True), (4, False)):
        *x, before = (t.double().requires_grad_() for t in conv_inputs((2, 3, 3), width))
        past, options = before.detach(), {"silu": silu}
        assert torch.autograd.gradcheck(lambda *t, p=past, o=options: kernels.causal_conv1d(*t, p, **o), x)
        got = kernels.causal_conv1d_backward(torch.ones_like(x[0]), *x, past, **options)
        kernels.causal_conv1d(*x, past, **options).sum().backward()
        for a, b in zip(got, x, strict=True):
            assert_close(a, b.grad)


def test_gradients_of_views(any_level: str) -> None:
    """x and z are halves of one tensor as in the model, delta is transposed, y's gradient is expanded."""

    def run(wide: Tensor, delta: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        x, z = wide.chunk(2, -1)
        u = conv(x, weight, silu=True)
        return scan(u, delta.transpose(1, 2), *others, z)[0].sum()

    x = inputs(2, 19, 24, 6)
    tensors = [torch.cat([x[0], x[6]], -1), x[1].transpose(1, 2).contiguous(), torch.randn(24, 4), *x[2:6]]
    got, want = leaves(list(tensors), torch.float32), leaves(list(tensors), torch.float64)
    conv, scan = kernels.causal_conv1d, kernels.selective_scan
    run(*got).backward()
    conv, scan = reference.causal_conv1d, reference.selective_scan
    run(*want).backward()
    for a, b in zip(got, want, strict=True):
        assert_close(a.grad, b.grad)


def test_gradients_in_half_precision(any_level: str) -> None:
    x = [t.bfloat16().requires_grad_() for t in inputs(2, 19, 24, 6)[:7]]
    kernels.selective_scan(*x)[0].sum().backward()
    want = reference.selective_scan_backward(torch.ones(2, 19, 24).double(), *(t.double() for t in x))
    for a, b in zip(x, want, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert_close(a.grad, b, 5e-2)


@pytest.mark.parametrize("index", range(7))
def test_one_input_alone_may_want_a_gradient(any_level: str, index: int) -> None:
    x = inputs(2, 7, 5, 3)[:7]
    x[index].requires_grad_()
    kernels.selective_scan(*x)[0].sum().backward()
    want = reference.selective_scan_backward(torch.ones(2, 7, 5).double(), *(t.double() for t in x))
    assert_close(x[index].grad, want[index])
    assert all(t.grad is None for i, t in enumerate(x) if i != index)


def test_without_gradients_there_is_no_graph(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (signal, weight, bias, _) = inputs(2, 7, 5, 3)[:7], conv_inputs((2, 7, 5), 4)
    with monkeypatch.context() as patch:  # autograd's machinery is not even entered
        for function in (kernels._Scan, kernels._Conv):
            patch.setattr(function, "apply", None)
        assert kernels.selective_scan(*x)[0].grad_fn is None
        assert kernels.causal_conv1d(signal, weight, bias).grad_fn is None
        x[0].requires_grad_()
        weight.requires_grad_()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert kernels.selective_scan(*x)[0].grad_fn is None
                assert kernels.causal_conv1d(signal, weight, bias).grad_fn is None
    assert kernels.selective_scan(*x)[0].grad_fn is not None
    assert kernels.causal_conv1d(signal, weight, bias).grad_fn is not None


def test_no_gradient_flows_through_states(any_level: str) -> None:
    *x, state = inputs(2, 7, 5, 3)
    state.requires_grad_()
    signal, weight, bias, before = conv_inputs((2, 7, 5), 4)
    before.requires_grad_()
    with pytest.raises(ValueError, match="^initial_state requires a gradient"):
        kernels.selective_scan(*x, state)
    with pytest.raises(ValueError, match="^before requires a gradient"):
        kernels.causal_conv1d(signal, weight, bias, before)
    with torch.no_grad():
        kernels.selective_scan(*x, state)
        kernels.causal_conv1d(signal, weight, bias, before)


def test_what_the_native_backward_lacks_is_said(level: str) -> None:
    x = inputs(2, 7, 5, 3)[:7]
    x[0].requires_grad_()
    with pytest.raises(ValueError, match="no gradient flows through the last state"):
        kernels.selective_scan(*x)[1].sum().backward()
    (slope,) = torch.autograd.grad(kernels.selective_scan(*x)[0].square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_gradients_of_an_empty_sequence(level: str) -> None:
    x = [t[:, :0] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs(2, 3, 5, 4)[:7])]
    dx, dweight, dbias = kernels.causal_conv1d_backward(
        x[0], x[0], torch.ones(5, 4), torch.ones(5), silu=True
    )
    assert dx.shape == (2, 0, 5) and (dweight == 0).all() and dbias is not None and (dbias == 0).all()
    x[2].requires_grad_()
    kernels.selective_scan(*x)[0].sum().backward()


def test_shapes_are_checked_before_the_convolutions_backward() -> None:
    x, weight, bias, _ = conv_inputs((2, 7, 5), 4)
    with pytest.raises(ValueError, match="^dy has shape"):
        kernels.causal_conv1d_backward(x[:, 1:], x, weight, bias)
    with pytest.raises(ValueError, match="^bias has shape"):
        kernels.causal_conv1d_backward(x, x, weight, bias[1:])
