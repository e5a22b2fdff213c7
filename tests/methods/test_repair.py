"""methods/repair.py: the sweep under every method of the linear layers against the transcriptions of their
papers; the repairs against brute-force least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transcription_linear as paper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.methods import Rule, entry_methods, repair
from sparsessm.methods.hessian import Factor, factorise
from sparsessm.methods.observers import Moments
from sparsessm.methods.patterns import NofM, Pattern, Unstructured, parse
from sparsessm.methods.repair import dense_target, output_error, readout, readout_error, refit, remix, sweep

METHODS = entry_methods()

SEEDS = st.integers(0, 2**31)
PAPERS = ["magnitude", "wanda", "sparsegpt"]
NM = ["1:4", "2:4", "4:8"]
# rows, columns: one of each; less than a block of 128, one, one and a bit, two and a bit
SHAPES = [(1, 1), (7, 1), (1, 9), (6, 37), (5, 128), (3, 129), (4, 200), (1, 200), (2, 261)]
Array = np.ndarray


def problem(seed: int, rows: int, columns: int, tokens: int | None = None) -> tuple[Array, Array]:
    """W (rows, columns) and X (columns, tokens): correlated inputs on different scales."""
    rng = np.random.default_rng(seed)
    tokens = 2 * (columns + 5) if tokens is None else tokens
    shared = rng.standard_normal((columns, 3)) @ rng.standard_normal((3, tokens))
    X = np.exp(0.5 * rng.standard_normal((columns, 1))) * (rng.standard_normal((columns, tokens)) + shared)
    return rng.standard_normal((rows, columns)), X


def rule_of(name: str, pattern: str | Pattern, sparsity: float = 0.5, **fields: Any) -> Rule:
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    return Rule(METHODS[name], pattern, sparsity, "zero", **fields)


def evidence(weight: Tensor, X: Array, rule: Rule) -> Any:
    """What the method's own observer sees, two windows in slabs of different lengths."""
    assert rule.method.watch is not None
    observer = rule.method.watch(weight, rule)
    tokens = torch.from_numpy(X.T.copy()).to(weight.dtype).unflatten(0, (2, -1))  # (W, T, in)
    cut = tokens.shape[1] // 3
    observer.add(tokens[:, :cut]), observer.add(tokens[:, cut:])
    return observer.result()


def run(
    W: Array, X: Array, rule: Rule, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[Array, Array]:
    """Weights and mask by a row of METHODS and the sweep, as pruning/entries.py puts them together."""
    weight = torch.from_numpy(W.copy()).to(dtype)
    before = weight.clone()
    seen = evidence(weight, X, rule) if rule.method.watch else None
    factor = None
    if rule.method.hessian:
        seen = factor = factorise(seen.gram.to(dtype))
    pruned, keep = sweep(
        weight,
        lambda now, columns: rule.method.score(now, seen, rule, columns),
        rule.pattern,
        rule.sparsity,
        factor,
        rule.method.width,
        by_row=rule.method.by_row,
        **how,
    )
    assert pruned.dtype == dtype and keep.dtype == torch.bool and pruned.is_contiguous()
    assert torch.equal(weight, before), "the weights given are left alone"
    assert not pruned[~keep].any()
    return pruned.numpy(), keep.numpy()


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


def assert_close(got: Array, want: Array, tolerance: float = 1e-9) -> None:
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


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


def depthwise(seed: int, rows: int, columns: int) -> tuple[Array, Array, Factor]:
    u = np.random.default_rng(seed).standard_normal((rows, 40)).cumsum(1)  # neighbours in time are alike
    u *= np.exp(np.random.default_rng(seed + 1).standard_normal((rows, 1)))
    H = paper.conv1d_hessians(u, columns)
    W = np.random.default_rng(seed + 2).standard_normal((rows, columns))
    return W, H, factorise(torch.from_numpy(H / 80))


def swept(W: Array, factor: Factor, rule: Rule, **how: Any) -> tuple[Array, Array]:
    weights, keep = sweep(
        torch.from_numpy(W),
        lambda now, columns: rule.method.score(now, factor, rule, columns),
        rule.pattern,
        rule.sparsity,
        factor,
        **how,
    )
    return weights.numpy(), keep.numpy()


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


# what was removed before


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    before=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    repaired=st.booleans(),
    width=st.integers(1, 20),
)
def test_what_is_gone_goes_first_and_counts(
    seed: int, before: float, sparsity: float, repaired: bool, width: int
) -> None:
    """The value stored for it does not matter, what stands there after a repair neither."""
    W, X = problem(seed, 4, 16)
    gone = np.random.default_rng(seed).random(W.shape) < before
    rule = rule_of("sparsegpt", "unstructured", sparsity)
    factor = factorise(evidence(torch.from_numpy(W), X, rule).gram)
    result, keep = sweep(
        torch.from_numpy(W),
        lambda now, columns: rule.method.score(now, factor, rule, columns),
        rule.pattern,
        sparsity,
        factor if repaired else None,
        width,
        gone=torch.from_numpy(gone),
    )
    blocksize = width if repaired else 16

    def choose(j: int, W: Array, U: Array) -> tuple[int, Array] | None:
        if j % blocksize:
            return None
        part = slice(j, min(j + blocksize, 16))
        score = np.where(gone, -1.0, W**2 / np.diag(U) ** 2)[:, part]
        order = np.argsort(score, axis=None, kind="stable")
        mask = np.ones(score.size, dtype=bool)
        mask[order[: max(round(sparsity * score.size), int(gone[:, part].sum()))]] = False
        return part.stop, mask.reshape(score.shape)

    want, mask = paper._sweep(W, 2 * X @ X.T, blocksize, 0.01, choose)
    if not repaired:
        mask = choose(0, W, paper.factor(2 * X @ X.T))[1]  # type: ignore[index]
        want = W * mask
    assert np.array_equal(keep.numpy(), mask)
    assert not keep.numpy()[gone].any()
    assert_close(result.numpy(), want, 1e-8)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("pattern", ["unstructured", *NM])
def test_pruning_twice(name: str, pattern: str) -> None:
    """What the first pruning removed stays removed, and the second share is that of the whole."""
    W, X = problem(10, 4, 136)
    once, first = run(W, X, rule_of(name, pattern, 0.3))
    again, second = run(once, X, rule_of(name, pattern, 0.5), gone=torch.from_numpy(~first))
    assert not second[~first].any()
    if pattern == "unstructured":
        assert (~second).sum() == round(0.5 * W.size) or name != "magnitude"
        assert abs((~second).mean() - 0.5) < 0.01
        assert second.sum() < first.sum()
    else:
        assert np.array_equal(second, first), "the groups are full already"
        assert np.array_equal(again, once)


def test_infinite_scores_of_what_is_gone() -> None:
    gone = torch.tensor([[False, True, False, True]])
    score = torch.tensor([[1.0, torch.inf, 3.0, 2.0]])
    _, keep = sweep(torch.ones(1, 4), lambda now, columns: score[:, columns], Unstructured(), 0.75, gone=gone)
    assert keep.tolist() == [[False, False, True, False]]


# dense-target


def streams(seed: int, rows: int, columns: int, tokens: int, dead: int = 0) -> tuple[Array, Array, Array]:
    """W, the inputs X in the dense model and those in the pruned one (columns, tokens)."""
    W, X = problem(seed, rows, columns, tokens)
    rng = np.random.default_rng(seed + 1)
    pruned = 0.8 * X + 0.3 * rng.standard_normal(X.shape) + 0.1 * rng.standard_normal((columns, columns)) @ X
    pruned[:dead] = 0
    return W, X, pruned


def moments(X: Array, pruned: Array) -> Moments:
    count = X.shape[1]
    return Moments(torch.from_numpy(pruned @ pruned.T / count), torch.from_numpy(X @ pruned.T / count))


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    tokens=st.integers(1, 40),
    damping=st.sampled_from([0.01, 0.5, 30.0]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_dense_target_is_least_squares(
    seed: int, rows: int, columns: int, tokens: int, damping: float, strength: float
) -> None:
    """lstsq over the tokens and a pull towards W: ||V X~ - W X||^2 / tokens + added ||V - W||^2."""
    W, X, pruned = streams(seed, rows, columns, tokens)
    seen = moments(X, pruned)
    factor = factorise(seen.gram, damping)
    pull = float(factor.added) ** 0.5
    system = np.vstack([pruned.T / tokens**0.5, pull * np.eye(columns)])
    aim = np.vstack([X.T @ W.T / tokens**0.5, pull * W.T])
    best = np.linalg.lstsq(system, aim, rcond=None)[0].T
    got = dense_target(torch.from_numpy(W), seen, factor, strength).numpy()
    assert_close(got, W + strength * (best - W), 1e-7)


def test_dense_target_with_next_to_no_damping_is_the_published_solution() -> None:
    W, X, pruned = streams(0, 4, 10, 50)
    seen = moments(X, pruned)
    got = dense_target(torch.from_numpy(W), seen, factorise(seen.gram, 1e-11)).numpy()
    assert_close(got, paper.dense_target(W, X @ pruned.T, pruned @ pruned.T, 0.0), 1e-7)
    assert np.linalg.norm(got @ pruned - W @ X) < 0.9 * np.linalg.norm(W @ pruned - W @ X)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tokens", [7, 100])
def test_dense_target_changes_nothing_where_the_streams_are_the_same(
    dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    W, X, _ = streams(1, 5, 20, tokens)
    X[3] = 0
    gram = torch.from_numpy(X @ X.T / tokens).to(dtype)
    weight = torch.from_numpy(W).to(dtype)
    got = dense_target(weight, Moments(gram, gram.clone()), factorise(gram))
    assert got.dtype == dtype
    assert_close(got.numpy(), weight.numpy(), tolerance)


def test_dense_target_keeps_the_columns_of_dead_inputs() -> None:
    """Dead in the pruned model, alive in the dense one: the others make up for them."""
    W, X, pruned = streams(2, 4, 9, 60, dead=2)
    seen = moments(X, pruned)
    factor = factorise(seen.gram)
    got = dense_target(torch.from_numpy(W), seen, factor).numpy()
    assert np.array_equal(got[:, :2], W[:, :2])
    pull = float(factor.added) ** 0.5
    system = np.vstack([pruned[2:].T / 60**0.5, pull * np.eye(7)])
    aim = np.vstack([X.T @ W.T / 60**0.5, pull * W[:, 2:].T])
    assert_close(got[:, 2:], np.linalg.lstsq(system, aim, rcond=None)[0].T)


def test_dense_target_of_a_depthwise_layer() -> None:
    rng = np.random.default_rng(0)
    X, pruned = rng.standard_normal((2, 5, 4, 30))  # (channels, taps, tokens)
    W = rng.standard_normal((5, 4))
    pruned += X
    pruned[1, 0] = 0
    gram, cross = (torch.from_numpy(a @ pruned.swapaxes(1, 2) / 30) for a in (pruned, X))
    factor = factorise(gram)
    got = dense_target(torch.from_numpy(W), Moments(gram, cross), factor, 0.7)
    for row in range(5):
        alone = factorise(gram[row])
        want = dense_target(torch.from_numpy(W[row : row + 1]), Moments(gram[row], cross[row]), alone, 0.7)
        assert_close(got[row].numpy(), want[0].numpy())


# refit


def state_before_refit(
    seed: int, rows: int, columns: int, share: float
) -> tuple[Tensor, Tensor, Tensor, Factor, Tensor]:
    """weight, goal, gram, factor, keep, as the sweep leaves them."""
    W, X = problem(seed, rows, columns)
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor = factorise(gram)
    rule = rule_of("sparsegpt", "unstructured", share)
    weight, keep = sweep(
        goal, lambda now, part: rule.method.score(now, factor, rule, part), rule.pattern, share, factor
    )
    return weight, goal, gram, factor, keep


def distance(weight: Tensor, goal: Tensor, gram: Tensor, factor: Factor) -> float:
    return output_error(weight - goal, gram + torch.diag_embed(factor.added.expand(gram.shape[:-1])))


def exact(goal: Array, gram: Array, added: float, keep: Array) -> Array:
    """Masked least squares of each row, solved on its support."""
    damped = gram + added * np.eye(len(gram))
    rows = [
        paper.obs_brute(row, damped, np.flatnonzero(~kept).tolist())[0]
        for row, kept in zip(goal, keep, strict=True)
    ]
    return np.array(rows)


@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS, rows=st.integers(1, 5), columns=st.integers(1, 14), share=st.floats(0, 1), swept=st.booleans()
)
def test_many_steps_of_refit_are_exact_least_squares(
    seed: int, rows: int, columns: int, share: float, swept: bool
) -> None:
    weight, goal, gram, factor, keep = state_before_refit(seed, rows, columns, share)
    start = weight if swept else goal * keep
    got = refit(start, goal, gram, factor, keep, steps=200)
    assert not got[~keep].any()
    assert_close(got.numpy(), exact(goal.numpy(), gram.numpy(), float(factor.added), keep.numpy()), 1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, share=st.floats(0, 1), steps=st.integers(0, 12), single=st.booleans())
def test_refit_never_hurts(seed: int, share: float, steps: int, single: bool) -> None:
    weight, goal, gram, factor, keep = state_before_refit(seed, 4, 14, share)
    before = distance(weight, goal, gram, factor)
    dtype = torch.float32 if single else torch.float64
    cast = Factor(factor.upper.to(dtype), factor.damping, factor.added.to(dtype), factor.dead)
    got = refit(weight.to(dtype), goal.to(dtype), gram.to(dtype), cast, keep, steps).double()
    assert not got[~keep].any() and torch.isfinite(got).all()
    scale = output_error(goal, gram)
    assert distance(got, goal, gram, factor) <= before * (1 + 1e-9) + (1e-6 if single else 1e-14) * scale
    if steps == 0:
        assert torch.equal(got, weight.to(dtype).double())


def test_more_steps_are_better_and_the_usual_ones_most_of_it() -> None:
    weight, goal, gram, factor, keep = state_before_refit(0, 6, 60, 0.6)
    best = torch.from_numpy(exact(goal.numpy(), gram.numpy(), float(factor.added), keep.numpy()))
    errors = [distance(refit(weight, goal, gram, factor, keep, n), goal, gram, factor) for n in range(12)]
    assert all(more < fewer for fewer, more in zip(errors, errors[1:], strict=False))
    least = distance(best, goal, gram, factor)
    assert errors[0] > 1.01 * least
    usual = distance(refit(weight, goal, gram, factor, keep), goal, gram, factor)
    assert usual == errors[10] and usual - least < 0.1 * (errors[0] - least)


def test_refit_with_dead_inputs_and_nothing_to_repair() -> None:
    W, X = problem(3, 4, 12)
    X[[0, 5]] = 0
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor, keep = factorise(gram), torch.from_numpy(np.random.default_rng(0).random(W.shape) < 0.5)
    got = refit(goal * keep, goal, gram, factor, keep, 100)
    assert torch.equal(got[:, [0, 5]], (goal * keep)[:, [0, 5]])
    assert_close(got.numpy(), exact(W, gram.numpy(), float(factor.added), keep.numpy()), 1e-8)
    everything = torch.ones_like(keep)
    assert torch.equal(refit(goal, goal, gram, factor, everything), goal)
    assert not refit(goal * 0, goal, gram, factor, ~everything).any()
    nothing = factorise(gram * 0)
    assert torch.equal(refit(goal * keep, goal, gram * 0, nothing, keep), goal * keep)


def test_refit_of_a_depthwise_layer() -> None:
    W, H, factor = depthwise(4, 9, 6)
    gram, goal = torch.from_numpy(H / 80), torch.from_numpy(W)
    weights, keep = swept(W, factor, rule_of("sparsegpt", "unstructured"))
    got = refit(torch.from_numpy(weights), goal, gram, factor, torch.from_numpy(keep), 50)
    for row in range(9):
        want = exact(W[row : row + 1], H[row] / 80, float(factor.added[row]), keep[row : row + 1])
        assert_close(got[row].numpy(), want[0], 1e-8)
    error = output_error(got - goal, gram)
    by_hand = sum(paper.output_error(W[row], got[row].numpy(), H[row] / 40) for row in range(9))
    assert error == pytest.approx(by_hand)


def test_output_error_is_the_energy_of_the_output() -> None:
    W, X = problem(11, 3, 6)
    gram = torch.from_numpy(X @ X.T / X.shape[1])
    assert output_error(torch.from_numpy(W), gram) == pytest.approx(((W @ X) ** 2).sum() / X.shape[1])


# readouts of states


def states_and_readouts(seed: int, steps: int, channels: int, states: int) -> tuple[Array, Array]:
    """C (S, N) and h (S, D, N), states alike as neighbours are."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((states, 2))
    C = rng.standard_normal((steps, states)) + rng.standard_normal((steps, 2)) @ shared.T
    h = 0.5 * rng.standard_normal((steps, channels, states))
    return C, h + rng.standard_normal((steps, channels, 2)) @ shared.T


def full_sums(C: Array, h: Array, weight: Array) -> Tensor:
    """[n, n', m, m'] = sum C_n C_n' sum_d w_d h_dm h_dm', by loops."""
    states = C.shape[1]
    full = np.zeros([states] * 4)
    for s in range(len(C)):
        pairs = sum(weight[s, d] * np.outer(h[s, d], h[s, d]) for d in range(h.shape[1]))
        full += np.multiply.outer(np.outer(C[s], C[s]), pairs)
    return torch.from_numpy(full)


def products_of(C: Array, h: Array, weight: Array, kept: list[int]) -> tuple[Array, Array]:
    """The features (steps and channels, N r) and the output that they should restore, weighted."""
    rows, wanted = [], []
    for s in range(len(C)):
        for d in range(h.shape[1]):
            root = np.sqrt(weight[s, d])
            rows.append(root * np.outer(C[s], h[s, d, kept]).ravel())
            wanted.append(root * (C[s] @ h[s, d]))
    return np.array(rows), np.array(wanted)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, states=st.integers(1, 5), data=st.data())
def test_readouts_are_least_squares_over_all_products(seed: int, states: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, states - 1), min_size=1)))
    C, h = states_and_readouts(seed, 6 * states, 6, states)
    weight = np.random.default_rng(seed + 1).random((6 * states, 6)) ** 2
    keep = torch.zeros(states, dtype=torch.bool)
    keep[kept] = True
    full = full_sums(C, h, weight)
    features, wanted = products_of(C, h, weight, kept)
    best, *_ = np.linalg.lstsq(features, wanted, rcond=None)
    rest = np.square(wanted - features @ best).sum()
    for damping in (1e-10, 1e-4):
        mix = readout(full, keep, damping)
        assert mix.shape == (states, len(kept)) and mix.dtype == torch.float64
        error = np.square(wanted - features @ mix.numpy().ravel()).sum()
        measured = readout_error(full, keep, mix)
        assert abs(measured - error) <= 1e-8 * np.square(wanted).sum()
        assert rest <= error * (1 + 1e-9) + 1e-12
        start = np.eye(states)[:, kept].ravel()
        added = damping * np.square(features).sum(0).mean()
        # the damped problem as one plain least squares
        A = np.concatenate([features, np.sqrt(added) * np.eye(len(start))])
        damped, *_ = np.linalg.lstsq(A, np.concatenate([wanted, np.sqrt(added) * start]), rcond=None)
        np.testing.assert_allclose(mix.numpy().ravel(), damped, rtol=0, atol=2e-5)
        if damping == 1e-10:
            assert error <= rest + 1e-6 * np.square(wanted).sum()


def test_readouts_of_all_states_stay_as_they_are() -> None:
    C, h = states_and_readouts(0, 20, 4, 4)
    full, keep = full_sums(C, h, np.ones((20, 4))), torch.ones(4, dtype=torch.bool)
    mix = readout(full, keep)
    torch.testing.assert_close(mix, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert abs(readout_error(full, keep, mix)) < 1e-9 * float(torch.einsum("abab->", full))


def test_readouts_without_any_state_or_signal() -> None:
    C, h = states_and_readouts(0, 20, 4, 4)
    full = full_sums(C, h, np.ones((20, 4)))
    nothing = torch.zeros(4, dtype=torch.bool)
    mix = readout(full, nothing)
    assert mix.shape == (4, 0)
    whole = np.square((h @ C[:, :, None])[..., 0]).sum()
    assert readout_error(full, nothing, mix) == pytest.approx(float(whole))
    silent = readout(torch.zeros_like(full), torch.arange(4) < 2)
    torch.testing.assert_close(silent, torch.eye(4, dtype=torch.float64)[:, :2])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fewer", [1, 4])
def test_a_dense_target_with_fewer_inputs(strength: float, fewer: int) -> None:
    """argmin |V X~ - W X|^2 / n + added |V - start|^2 as one least squares; W has inputs that V has not."""
    W, X = problem(0, 5, 8)
    other = X[fewer:] + 0.1 * problem(1, 5, 8)[1][fewer:]
    count = X.shape[1]
    start = W[:, fewer:] + 0.1
    seen = Moments(torch.from_numpy(other @ other.T / count), torch.from_numpy(X @ other.T / count))
    factor = factorise(seen.gram)
    got = dense_target(torch.from_numpy(W), seen, factor, strength, start=torch.from_numpy(start))
    root = np.sqrt(float(factor.added) * count) * np.eye(8 - fewer)
    A = np.concatenate([other.T, root])
    best, *_ = np.linalg.lstsq(A, np.concatenate([X.T @ W.T, root @ start.T]), rcond=None)
    np.testing.assert_allclose(got.numpy(), start + strength * (best.T - start), rtol=0, atol=1e-8)


def test_a_dense_target_keeps_the_start_of_dead_inputs() -> None:
    W, X = problem(0, 3, 6)
    other = X[2:].copy()
    other[1] = 0.0
    seen = Moments(torch.from_numpy(other @ other.T), torch.from_numpy(X @ other.T))
    start = torch.from_numpy(W[:, 2:])
    got = dense_target(torch.from_numpy(W), seen, factorise(seen.gram), start=start)
    assert torch.equal(got[:, 1], start[:, 1]) and not torch.allclose(got, start)


def ridge(features: Array, wanted: Array, start: Array, damping: float) -> Array:
    """The damped least squares as one plain one."""
    added = np.sqrt(damping * np.square(features).sum(0).mean())
    A = np.concatenate([features, added * np.eye(len(start))])
    return np.linalg.lstsq(A, np.concatenate([wanted, added * start]), rcond=None)[0]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, states=st.integers(2, 4), rounds=st.integers(1, 3), data=st.data())
def test_inputs_and_readouts_in_turn_are_least_squares(
    seed: int, states: int, rounds: int, data: st.DataObject
) -> None:
    """h of each pair of a kept state's decay with any state's input, and of what goes, made up."""
    kept = sorted(data.draw(st.sets(st.integers(0, states - 1), min_size=1, max_size=states - 1)))
    gone = [n for n in range(states) if n not in kept]
    r, rng = len(kept), np.random.default_rng(seed)
    C, _ = states_and_readouts(seed, 12 * states, 5, states)
    h = rng.standard_normal((len(C), 5, r * states + len(gone))) + rng.standard_normal((len(C), 5, 1))
    pair = {k: i * states + k for i, k in enumerate(kept)} | {n: r * states + i for i, n in enumerate(gone)}
    wanted = sum(C[:, None, n] * h[:, :, pair[n]] for n in range(states)).ravel()
    full = np.einsum("sa,sb,sdp,sdq->abpq", C, C, h, h)
    keep = torch.zeros(states, dtype=torch.bool)
    keep[kept] = True
    start = torch.eye(states, dtype=torch.float64)[:, kept] + 0.1 * torch.from_numpy(
        rng.standard_normal((states, r))
    )
    write, read = remix(torch.from_numpy(full), keep, start, 1e-4, rounds)
    assert write.shape == (r, states) and read.shape == (states, r)
    M, Z, made = np.eye(states)[kept], start.numpy(), h[:, :, : r * states].reshape(len(C), 5, r, states)
    errors_ = []
    for _ in range(rounds):
        features = np.einsum("sk,sdkm->sdkm", C @ Z, made).reshape(len(wanted), -1)
        M = ridge(features, wanted, np.eye(states)[kept].ravel(), 1e-4).reshape(r, states)
        features = np.einsum("sn,sdkm,km->sdnk", C, made, M).reshape(len(wanted), -1)
        Z = ridge(features, wanted, np.eye(states)[:, kept].ravel(), 1e-4).reshape(states, r)
        errors_.append(np.square(wanted - features @ Z.ravel()).sum())
    scale = max(1.0, np.abs(M).max(), np.abs(Z).max())
    np.testing.assert_allclose(write.numpy(), M, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(read.numpy(), Z, rtol=0, atol=1e-5 * scale)
    assert errors_ == sorted(errors_, reverse=True) or errors_[-1] <= 1.01 * errors_[0]
