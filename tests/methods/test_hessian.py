"""methods/hessian.py: the factor against plain inversion, on matrices that no inversion likes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transcription_linear import factor as transcribed

from sparsessm.methods.hessian import DAMPING, Factor, factorise

SEEDS = st.integers(0, 2**31)


def gram_of(seed: int, columns: int, tokens: int | None = None, batch: tuple[int, ...] = ()) -> Tensor:
    """Mean x x' of correlated inputs on scales e^-2 to e^2, float64."""
    g = torch.Generator().manual_seed(seed)
    tokens = 3 * columns if tokens is None else tokens
    x = torch.randn(*batch, columns, tokens, generator=g, dtype=torch.float64)
    if tokens > columns:
        x = torch.randn(*batch, columns, columns, generator=g, dtype=torch.float64) @ x
    x = x * torch.randn(*batch, columns, 1, generator=g, dtype=torch.float64).exp()
    return x @ x.mT / tokens


def spectrum(seed: int, values: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues and mean diagonal 1."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / (2 * float(values.mean()))


def assert_inverts(got: Factor, hessian: Tensor, tolerance: float = 1e-9) -> None:
    """U'U (hessian + added I) = I, U upper triangular with a positive diagonal."""
    upper = got.upper
    assert torch.equal(upper, upper.triu()) and (got.pivots > 0).all()
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype)
    damped = hessian + got.added[..., None] * eye
    assert (upper.mT @ upper @ damped - eye).abs().max() < tolerance
    inverse = torch.linalg.inv(damped.double())
    torch.testing.assert_close(
        got.inverse_diagonal.double(), inverse.diagonal(dim1=-2, dim2=-1), rtol=10 * tolerance, atol=0
    )


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, columns=st.integers(1, 30), damping=st.sampled_from([0.01, 0.1, 1.0]))
def test_factor_of_the_damped_inverse(seed: int, columns: int, damping: float) -> None:
    gram = gram_of(seed, columns)
    before = gram.clone()
    got = factorise(gram, damping)
    assert torch.equal(gram, before)
    assert got.damping == damping and not got.dead.any()
    torch.testing.assert_close(got.added, damping * gram.diagonal().mean()[None])
    assert_inverts(got, gram)
    # H = 2XX' instead of the mean changes the scale only
    want = transcribed(2 * 7 * gram.numpy(), damping) * 14**0.5
    np.testing.assert_allclose(got.upper, want, rtol=1e-7, atol=1e-9 * want.max())


def test_the_default_is_that_of_sparsegpt() -> None:
    assert DAMPING == 0.01
    assert factorise(gram_of(0, 5)).damping == 0.01


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, rows=st.integers(1, 5), columns=st.integers(1, 6))
def test_a_batch_is_its_members(seed: int, rows: int, columns: int) -> None:
    gram = gram_of(seed, columns, batch=(rows,))
    got = factorise(gram)
    assert_inverts(got, gram)
    assert got.added.shape == (rows, 1) and got.dead.shape == got.pivots.shape == (rows, columns)
    for row in range(rows):
        alone = factorise(gram[row])
        torch.testing.assert_close(got.upper[row], alone.upper, rtol=1e-9, atol=0)
        assert torch.equal(got.added[row], alone.added)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, dead=st.lists(st.booleans(), min_size=1, max_size=12), scale=st.floats(-12, 12))
def test_dead_inputs_touch_no_other(seed: int, dead: list[bool], scale: float) -> None:
    """The living have the factor that they have alone, whatever the unit of the inputs."""
    gone = torch.tensor(dead)
    gram = gram_of(seed, len(dead)) * 10**scale
    gram[gone], gram[:, gone] = 0, 0
    got = factorise(gram)
    assert torch.equal(got.dead, gone) and got.damping == DAMPING
    assert torch.isfinite(got.upper).all()
    off = got.upper - torch.diag(got.pivots)
    assert not off[gone].any() and not off[:, gone].any()
    if not gone.all():
        alone = factorise(gram[~gone][:, ~gone])
        torch.testing.assert_close(got.upper[~gone][:, ~gone], alone.upper, rtol=1e-8, atol=0)
        torch.testing.assert_close(got.added, alone.added)


def test_dead_inputs_of_some_rows_of_a_batch() -> None:
    gram = gram_of(0, 4, batch=(5,))
    gram[0] = 0
    gram[1, :2], gram[1, :, :2] = 0, 0
    got = factorise(gram)
    assert got.dead.tolist() == [[True] * 4, [True, True, False, False], *[[False] * 4] * 3]
    for row in range(5):
        torch.testing.assert_close(got.upper[row], factorise(gram[row]).upper, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.upper[1, 2:, 2:], factorise(gram[1, 2:, 2:]).upper)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 11])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_more_columns_than_tokens(tokens: int, scale: float, dtype: torch.dtype) -> None:
    """Rank-deficient: the usual damping is enough, and it is not more than that."""
    gram = (gram_of(1, 40, tokens) * scale).to(dtype)
    got = factorise(gram)
    assert got.damping == DAMPING
    assert got.upper.dtype == dtype
    assert_inverts(got, gram, 1e-9 if dtype == torch.float64 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_and_nearly_equal_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = x[0]
    x[3] = x[2] * (1 + 1e-9)
    x[5] = 1e6 * x[4]  # its power is nearly all of the mean
    gram = (x @ x.mT / 50).to(dtype)
    got = factorise(gram)
    assert got.damping == DAMPING
    assert_inverts(got, gram, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "lowest,needed",
    [(1e-9, 0.01), (0.0, 0.01), (-1e-9, 0.01), (-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)],
)
def test_damping_grows_to_what_is_needed_and_no_further(lowest: float, needed: float, batch: bool) -> None:
    """Slightly indefinite by rounding, and worse; the smallest eigenvalue is `lowest` times the mean."""
    values = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    values[0] = lowest
    values[1:] *= (12 - lowest) / values[1:].sum()  # mean 1
    hessian = spectrum(3, values)
    gram = torch.stack([gram_of(5, 12), hessian]) if batch else hessian
    got = factorise(gram)
    assert got.damping == pytest.approx(needed, rel=1e-12)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    torch.testing.assert_close(got.added, needed * mean)
    assert_inverts(got, gram, 1e-8)
    if needed > DAMPING:
        with pytest.raises(torch.linalg.LinAlgError):
            torch.linalg.cholesky(hessian + needed / 10 * torch.eye(12, dtype=torch.float64))


def test_it_never_becomes_the_identity() -> None:
    """Whatever the damping, the off-diagonal part of the Hessian is still in the factor."""
    hessian = spectrum(0, torch.tensor([-0.5, 1, 1, 2.5], dtype=torch.float64))
    upper = factorise(hessian).upper
    assert (upper.triu(1).abs().sum() / upper.diagonal().sum()) > 0.05


def test_without_damping() -> None:
    gram = gram_of(2, 7)
    got = factorise(gram, 0.0)
    assert got.damping == 0 and (got.added == 0).all()
    assert_inverts(got, gram, 1e-7)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # a singular one may pass: its last pivot is rounding
    assert factorise(indefinite, 0.0).damping > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_what_is_not_finite_is_refused(value: float, place: tuple[int, int]) -> None:
    gram = gram_of(0, 4, batch=(3,))
    gram[1][place] = value
    with pytest.raises(ValueError, match="its Hessian is not finite"):
        factorise(gram)
    with pytest.raises(ValueError, match="its Hessian is not finite"):
        factorise(gram[1])


def test_what_is_no_hessian_is_refused() -> None:
    hessian = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    with pytest.raises(ValueError, match="not positive definite even with damping 10000"):
        factorise(hessian)


def test_no_living_input() -> None:
    got = factorise(torch.zeros(3, 3))
    assert got.dead.all() and torch.isfinite(got.upper).all()
    assert torch.equal(got.upper, torch.diag(got.pivots))
