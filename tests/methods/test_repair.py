"""methods/repair.py: the sweep under every method of the linear layers, against transcriptions of papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transcription_linear as paper
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import NM, PAPERS, SEEDS, Array, assert_close, depthwise, evidence, problem, rule_of, run, swept
from torch import Tensor

from sparsessm.methods import repair
from sparsessm.methods.hessian import factorise
from sparsessm.methods.patterns import NofM, Pattern, parse
from sparsessm.methods.repair import sweep

# rows, columns: one of each; less than a block of 128, one, one and a bit, two and a bit
SHAPES = [(1, 1), (7, 1), (1, 9), (6, 37), (5, 128), (3, 129), (4, 200), (1, 200), (2, 261)]


def reference(name: str, W: Array, X: Array, pattern: Pattern, sparsity: float) -> tuple[Array, Array]:
    if isinstance(pattern, NofM):
        if name == "sparsegpt":
            return paper.sparsegpt_nm(W, 2 * X @ X.T, pattern.n, pattern.m)
        keep = paper.magnitude_nm(W, pattern.n, pattern.m) if name == "magnitude" else None
        keep = paper.wanda_nm(W, X, pattern.n, pattern.m) if keep is None else keep
    elif name == "sparsegpt":
        return paper.sparsegpt(W, 2 * X @ X.T, sparsity)
    else:
        keep = paper.magnitude_mask(W, sparsity) if name == "magnitude" else paper.wanda_mask(W, X, sparsity)
    return W * keep, keep


# the papers


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_unstructured_equals_the_paper(name: str, shape: tuple[int, int], sparsity: float) -> None:
    W, X = problem(0, *shape)
    rule = rule_of(name, "unstructured", sparsity)
    weights, keep = run(W, X, rule)
    want, mask = reference(name, W, X, rule.pattern, sparsity)
    assert np.array_equal(keep, mask)
    assert_close(weights, want)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("pattern", NM)
@pytest.mark.parametrize("shape", [(1, 8), (6, 40), (4, 128), (3, 136), (2, 264)])
def test_n_of_m_equals_the_paper(name: str, shape: tuple[int, int], pattern: str) -> None:
    W, X = problem(1, *shape)
    rule = rule_of(name, pattern)
    weights, keep = run(W, X, rule)
    want, mask = reference(name, W, X, rule.pattern, 0.5)
    assert np.array_equal(keep, mask)
    assert_close(weights, want)
    n, m = map(int, pattern.split(":"))
    assert (keep.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("pattern,sparsity", [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5)])
def test_float32_equals_the_paper(name: str, pattern: str, sparsity: float) -> None:
    W, X = (array.astype(np.float32).astype(np.float64) for array in problem(2, 4, 200))
    rule = rule_of(name, pattern, sparsity)
    weights, keep = run(W, X, rule, torch.float32)
    want, mask = reference(name, W, X, rule.pattern, sparsity)
    assert np.array_equal(keep, mask)
    assert_close(weights, want, 1e-4)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=st.integers(1, 5),
    columns=st.integers(1, 24),
    width=st.integers(1, 30),
    batch=st.integers(1, 30),
    sparsity=st.floats(0, 1),
)
def test_blocks_of_any_width(
    seed: int, rows: int, columns: int, width: int, batch: int, sparsity: float
) -> None:
    """The mask is chosen every `width` columns from weights that hold all repairs so far, however many of
    them the lazy pushes take together."""
    W, X = problem(seed, rows, columns)
    H = 2 * X @ X.T
    rule = rule_of("sparsegpt", "unstructured", sparsity)
    factor = factorise(evidence(torch.from_numpy(W), X, rule).gram)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "WIDTH", batch)
        weights, keep = sweep(
            torch.from_numpy(W),
            lambda now, columns: rule.method.score(now, factor, rule, columns),
            rule.pattern,
            sparsity,
            factor,
            width,
        )
    want, mask = paper.sparsegpt(W, H, sparsity, blocksize=width)
    assert np.array_equal(keep, mask)
    assert_close(weights.numpy(), want, 1e-8)


@pytest.mark.parametrize("batch", [1, 8, 100])
@pytest.mark.parametrize("pattern", NM)
def test_lazy_batches_do_not_matter_to_groups(
    pattern: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, X = problem(3, 4, 40)
    monkeypatch.setattr(repair, "WIDTH", batch)
    weights, keep = run(W, X, rule_of("sparsegpt", pattern))
    want, mask = reference("sparsegpt", W, X, parse(pattern), 0.5)
    assert np.array_equal(keep, mask)
    assert_close(weights, want)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(PAPERS),
    W=st.integers(1, 4).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(-2, 2), min_size=8, max_size=8), min_size=rows, max_size=rows
        )
    ),
    norms=st.lists(st.sampled_from([1.0, 2.0]), min_size=8, max_size=8),
    pattern=st.sampled_from(["unstructured", *NM]),
    sparsity=st.floats(0, 1),
)
def test_ties_lose_the_lower_index(
    name: str, W: list[list[int]], norms: list[float], pattern: str, sparsity: float
) -> None:
    """Uncorrelated inputs, whose norms are powers of two: scores are exact, and many are equal."""
    weight, X = np.array(W, dtype=np.float64), 2 * np.diag(norms)  # 8 tokens
    if name == "sparsegpt":
        X = 2 * np.eye(8)  # equal pivots, to the last bit
    rule = rule_of(name, pattern, sparsity)
    weights, keep = run(weight, np.hstack([X, X]), rule)
    want, mask = reference(name, weight, np.hstack([X, X]), rule.pattern, sparsity)
    assert np.array_equal(keep, mask)
    assert_close(weights, want)


@pytest.mark.parametrize("pattern,sparsity", [("unstructured", 0.5), ("2:4", 0.5), ("1:4", 0.75)])
def test_more_columns_than_tokens(pattern: str, sparsity: float) -> None:
    """A singular Hessian: what the paper's damping makes of it."""
    W, X = problem(4, 3, 152, tokens=20)
    rule = rule_of("sparsegpt", pattern, sparsity)
    weights, keep = run(W, X, rule)
    want, mask = reference("sparsegpt", W, X, rule.pattern, sparsity)
    assert np.array_equal(keep, mask)
    assert_close(weights, want, 1e-7)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern,sparsity", [("unstructured", 0.25), ("unstructured", 0.6), ("2:4", 0.5)])
def test_dead_inputs_go_first(name: str, pattern: str, sparsity: float) -> None:
    """As in the paper; only that what must stay of a dead column keeps its weights, for they cost nothing."""
    W, X = problem(5, 4, 40)
    dead = np.zeros(40, dtype=bool)
    dead[[0, 4, 5, 6, 17, 39]] = True
    X[dead] = 0
    # a dead input counts in the damping: in the paper as one of power 1, here as one of mean power
    X /= (2 * (X**2).sum(1)[~dead].mean()) ** 0.5
    rule = rule_of(name, pattern, sparsity)
    weights, keep = run(W, X, rule)
    want, mask = reference(name, W, X, rule.pattern, sparsity)
    assert np.array_equal(keep, mask)
    if pattern == "unstructured":
        assert not keep[:, dead].any()
    else:
        assert keep[:, 6].all(), "three of a group are dead: one must stay"
    assert_close(weights[:, ~dead], want[:, ~dead])
    assert np.array_equal(weights[:, dead], (W * keep)[:, dead])


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_the_unit_of_the_inputs_does_not_matter(scale: float) -> None:
    W, X = problem(6, 4, 40)
    X[[2, 9]] = 0
    one, other = (run(W, part, rule_of("sparsegpt", "unstructured")) for part in (X, X * scale))
    assert np.array_equal(one[1], other[1])
    assert_close(one[0], other[0])


def test_rows_compete_by_what_they_cost() -> None:
    """A row that costs F times as much is a row that is sqrt(F) times as large."""
    W, X = problem(7, 5, 150)
    cost = np.array([1.0, 0.01, 4.0, 100.0, 0.0])
    weights, keep = run(W, X, rule_of("sparsegpt", "unstructured", prices=torch.from_numpy(cost)))
    scaled, mask = paper.sparsegpt(W * np.sqrt(cost)[:, None], 2 * X @ X.T, 0.5)
    assert np.array_equal(keep, mask) and keep[3].mean() > 0.9 > 0.5 > keep[1].mean()
    assert_close(weights[:4], scaled[:4] / np.sqrt(cost)[:4, None], 1e-8)


@pytest.mark.parametrize("columns", [40, 200])
def test_the_repair_pays(columns: int) -> None:
    W, X = problem(8, 4, columns)
    H = 2 * X @ X.T
    _, keep = run(W, X, rule_of("sparsegpt", "unstructured"))
    errors = {name: paper.output_error(W, run(W, X, rule_of(name, "unstructured"))[0], H) for name in PAPERS}
    assert errors["sparsegpt"] < paper.output_error(W, W * keep, H)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_without_repair_the_whole_matrix_is_masked_at_once() -> None:
    W, X = problem(9, 3, 200)
    rule = rule_of("sparsegpt", "unstructured", 0.5)
    factor = factorise(evidence(torch.from_numpy(W), X, rule).gram)
    asked: list[slice] = []

    def score(now: Tensor, columns: slice) -> Tensor:
        asked.append(columns)
        return rule.method.score(now, factor, rule, columns)

    weights, keep = sweep(torch.from_numpy(W), score, rule.pattern, 0.5)
    assert asked == [slice(0, 200)]
    assert torch.equal(weights, torch.from_numpy(W) * keep)
    pivots = np.diag(paper.factor(2 * X @ X.T))
    assert np.array_equal(keep.numpy(), paper.magnitude_mask(W / pivots, 0.5))


# depthwise: a Hessian for each row


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=st.integers(1, 6), columns=st.integers(1, 8), sparsity=st.floats(0, 1))
def test_depthwise_rows_are_matrices_of_their_own(
    seed: int, rows: int, columns: int, sparsity: float
) -> None:
    W, H, factor = depthwise(seed, rows, columns)
    weights, keep = swept(W, factor, rule_of("sparsegpt", "unstructured", sparsity), by_row=True)
    want, mask = paper.conv1d(W[:, None], H, sparsity)
    assert np.array_equal(keep, mask[:, 0])
    assert_close(weights, want[:, 0], 1e-8)


@pytest.mark.parametrize("pattern", NM)
def test_depthwise_in_groups(pattern: str) -> None:
    W, H, factor = depthwise(0, 7, 16)
    weights, keep = swept(W, factor, rule_of("sparsegpt", pattern))
    for row in range(7):
        want, mask = paper.sparsegpt_nm(W[row : row + 1], H[row], *map(int, pattern.split(":")))
        assert np.array_equal(keep[row : row + 1], mask)
        assert_close(weights[row : row + 1], want)


@pytest.mark.parametrize("width", [3, 128])
def test_depthwise_rows_compete(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask over all channels, each repaired with its own Hessian, in one block or several."""
    monkeypatch.setattr(repair, "WIDTH", width)
    W, H, factor = depthwise(1, 9, 11)
    first = slice(0, width)
    weights, keep = swept(W, factor, rule_of("sparsegpt", "unstructured", 0.4), width=width)
    pivots = np.stack([np.diag(paper.factor(h / 80)) for h in H])
    assert np.array_equal(keep[:, first], paper.magnitude_mask((W / pivots)[:, first], 0.4))
    assert keep[:, first].sum(1).min() < keep[:, first].sum(1).max()
    for row in range(9):
        want = paper.sparsegpt_fixed(W[row : row + 1], H[row], keep[row : row + 1])
        assert_close(weights[row : row + 1], want, 1e-8)
