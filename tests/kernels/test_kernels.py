"""The native kernels against the float64 reference, at every level this CPU has, on random and on hostile
shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import SHAPES, assert_close, inputs
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.kernels import reference

pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")


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
