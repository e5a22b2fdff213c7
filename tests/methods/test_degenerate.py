"""Zero, rank-deficient, duplicated and extremely scaled inputs of everything that solves, divides or
normalises: no NaN and no infinity, no change where there is no signal, and else the least squares of float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_mamba2
from planned import prune
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.methods import Rule, entry_methods
from sparsessm.methods.balanced import balanced_truncation, energies
from sparsessm.methods.exact import elimination_scores
from sparsessm.methods.hessian import factorise, near
from sparsessm.methods.observers import ErrorSums, InputNorm, Moments, StateMoments, StateSums
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import dense_target, readout, readout_error, refit, refit_skip, remix
from sparsessm.methods.structured import Reader, Units, elimination
from sparsessm.pruning.blocks import cosine
from sparsessm.pruning.mixes import Trial, predicted
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

SEEDS = st.integers(0, 2**31)
KINDS = st.sampled_from(["zero", "one direction", "duplicated", "some silent", "few", "full"])
SCALES = st.integers(-30, 30).map(lambda power: 10.0**power)
TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))


def inputs(kind: str, seed: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float64 of some degeneracy, on different scales."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, columns)) * np.exp(random.standard_normal(columns))
    if kind == "zero":
        x *= 0
    elif kind == "one direction":
        x = x[:, :1] * random.standard_normal(columns)
    elif kind == "duplicated":
        x[:, columns // 2 :] = x[:, : columns - columns // 2]
    elif kind == "some silent":
        x[:, ::2] = 0
    elif kind == "few":  # fewer tokens than inputs
        x[2:] = 0
    return torch.from_numpy(x)


def same(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a share of the largest value."""
    assert torch.isfinite(got).all()
    assert float((got - want).abs().max()) <= tolerance * max(float(want.abs().max()), 1e-300)


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, seed=SEEDS, columns=st.integers(1, 12), power=st.integers(-16, 16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hessian_is_factored_in_any_unit(
    dtype: torch.dtype, kind: str, seed: int, columns: int, power: int
) -> None:
    x = inputs(kind, seed, 3 * columns, columns)
    gram = (x.T @ x / len(x)).to(dtype)
    factor, other = factorise(gram), factorise(gram * 16.0**power)
    living = (~factor.dead).to(dtype)
    damped = gram + torch.diag(factor.added * (1 + 100 * (1 - living)))  # dead: the mean diagonal
    again = factor.upper.mT @ factor.upper @ damped
    same(again.double(), torch.eye(columns, dtype=torch.float64), 5e-3 if dtype == torch.float32 else 1e-9)
    assert factor.damping == 0.01
    if living.any():  # a power of four changes the unit and not a bit
        assert torch.equal(other.upper * 4.0**power, factor.upper)
        assert torch.equal(other.added, factor.added * 16.0**power)


@pytest.mark.parametrize("gram", [1e-45, 1e-40, 1e-38, 3e38])
def test_a_hessian_at_the_ends_of_float32(gram: float) -> None:
    factor = factorise(torch.full((3, 3), gram) + torch.eye(3) * gram * 0.0)
    assert factor.damping == 0.01 and torch.isfinite(factor.upper).all()


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, seed=SEEDS, columns=st.integers(1, 10), unit=SCALES, size=SCALES)
def test_the_dense_target_is_damped_least_squares(
    kind: str, seed: int, columns: int, unit: float, size: float
) -> None:
    x = inputs(kind, seed, 2 * columns, columns)
    dense = x + 0.3 * inputs("full", seed + 1, 2 * columns, columns) * bool(x.any())
    weight = size * inputs("full", seed + 2, 3, columns)
    seen = Moments(unit * x.T @ x / len(x), unit * dense.T @ x / len(x))
    scaled, by = seen.scaled(torch.float64)
    assert by == 1 or 0.4 <= float(scaled.power.mean()) <= 2.1
    factor = factorise(scaled.gram)
    got = dense_target(weight, scaled, factor)
    # |X V' - X_dense W'|^2 / n + added |V - W|^2 as one plain least squares
    added = float(factor.added) * by / unit
    rows = torch.cat([x / len(x) ** 0.5, added**0.5 * torch.eye(columns, dtype=torch.float64)])
    wanted = torch.cat([dense / len(x) ** 0.5 @ weight.T, added**0.5 * weight.T])
    want = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    want = torch.where(factor.dead, weight, want)
    same(got, want, 1e-8)
    if not x.any():
        assert torch.equal(got, weight)


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, seed=SEEDS, columns=st.integers(1, 10), unit=SCALES, size=SCALES)
def test_refit_is_damped_least_squares_of_what_is_kept(
    kind: str, seed: int, columns: int, unit: float, size: float
) -> None:
    x = inputs(kind, seed, 2 * columns, columns)
    goal = size * inputs("full", seed + 2, 4, columns)
    seen, _ = Moments(unit * x.T @ x / len(x)).scaled(torch.float64)
    factor = factorise(seen.gram)
    keep = torch.from_numpy(np.random.default_rng(seed).random((4, columns)) < 0.6)
    keep[0] = False
    got = refit(goal * keep, goal, seen.gram, factor, keep, 60)
    damped = seen.gram + torch.diag(factor.added.expand(columns))
    for row, kept in enumerate(keep):
        want = torch.zeros(columns, dtype=torch.float64)
        if kept.any():
            right = damped[kept] @ goal[row]
            best = torch.linalg.lstsq(damped[kept][:, kept], right[:, None], driver="gelsd").solution
            want[kept] = best[:, 0]
        same(got[row], want, 1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30])
def test_refit_in_float32_does_not_depend_on_the_unit_of_the_weights(size: float) -> None:
    x = inputs("duplicated", 3, 40, 12)
    gram = (x.T @ x / 40).float()
    goal, factor = inputs("full", 4, 5, 12).float(), factorise(gram)
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    unit = float(near(torch.tensor(size), torch.float32)) if size >= 1e-37 else 2.0**-128
    want = refit(goal * keep, goal, gram, factor, keep)
    got = refit((goal * unit) * keep, goal * unit, gram, factor, keep) / unit
    same(got, want, 1e-3 if unit < 1e-37 else 0.0)


def solved(gram: Tensor, weight: Tensor, unit: float, rule: Rule) -> Any:
    from sparsessm.pruning.entries import solve

    class Plain:
        matrix, removed, routed = weight, {"zero": 0.0}, False

    target: Any = Plain()
    return solve(target, rule, Moments(gram.double() * unit, gram.double() * unit))


@settings(deadline=None, max_examples=30)
@given(kind=KINDS, seed=SEEDS, method=st.sampled_from(["sparsegpt", "absorb"]), price=st.booleans())
def test_masks_do_not_depend_on_units(kind: str, seed: int, method: str, price: bool) -> None:
    x = inputs(kind, seed, 30, 16)
    gram, weight = (x.T @ x / 30).float(), inputs("full", seed + 1, 6, 16).float()
    repair = "self" if method == "sparsegpt" else "dense-target"
    done = []
    for unit, priced in ((1.0, 1.0), (4.0**-60, 4.0**-90), (4.0**60, 4.0**90)):
        cost = priced * inputs("full", seed + 2, 6, 1)[:, 0].abs() if price else None
        rule = Rule(METHODS[method], Unstructured(), 0.5, "zero", repair=repair, prices=cost)
        done.append(solved(gram, weight, unit, rule))
    for other in done:
        assert torch.isfinite(other.weight).all() and int(other.keep.sum()) == 48
        assert torch.equal(other.keep, done[0].keep) and torch.equal(other.weight, done[0].weight)
    if kind == "zero":  # no signal: what is kept is what it was
        assert torch.equal(done[0].weight, weight * done[0].keep)


def test_rows_that_all_cost_nothing_are_not_removed_in_the_order_of_their_number() -> None:
    x = inputs("full", 0, 30, 16)
    gram, weight = (x.T @ x / 30).float(), inputs("full", 1, 6, 16).float()
    rules = [
        Rule(METHODS["absorb"], Unstructured(), 0.5, "zero", repair="self", prices=cost)
        for cost in (None, torch.zeros(6, dtype=torch.float64))
    ]
    plain, free = (solved(gram, weight, 1.0, rule) for rule in rules)
    assert torch.equal(plain.keep, free.keep)


# --------------------------------------------------------------------------------------- states


def full_of(C: Tensor, h: Tensor) -> Tensor:
    """[n, n', m, m'] = sum C_n C_n' sum_d h_dm h_dm'; C (S, N), h (S, D, N)."""
    return torch.einsum("sa,sb,sdm,sdn->abmn", C, C, h, h)


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, seed=SEEDS, states=st.integers(1, 4), scale=SCALES, other=SCALES, data=st.data())
def test_readouts_are_damped_least_squares(
    kind: str, seed: int, states: int, scale: float, other: float, data: st.DataObject
) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, states - 1), min_size=1)))
    keep = torch.zeros(states, dtype=torch.bool)
    keep[kept] = True
    C, h = inputs("full", seed, 9, states), inputs(kind, seed + 1, 36, states).view(9, 4, states)
    mix = readout(full_of(scale * C, other * h), keep)
    start = torch.eye(states, dtype=torch.float64)[:, kept]
    features = torch.einsum("sn,sdk->sdnk", C, h[..., kept]).flatten(2).flatten(0, 1)
    wanted = torch.einsum("sn,sdn->sd", C, h).flatten()
    added = 1e-3 * float(features.square().sum(0).mean())
    rows = torch.cat([features, added**0.5 * torch.eye(features.shape[1], dtype=torch.float64)])
    right = torch.cat([wanted, added**0.5 * start.flatten()])
    want = torch.linalg.lstsq(rows, right[:, None], driver="gelsd").solution.view_as(start)
    if features.any():
        same(mix, want, 1e-6)
    else:
        assert torch.equal(mix, start)
    error = readout_error(full_of(scale * C, other * h), keep, mix)
    assert math.isfinite(error)


@settings(deadline=None, max_examples=40)
@given(kind=KINDS, seed=SEEDS, scale=SCALES, other=SCALES)
def test_inputs_and_readouts_in_any_unit(kind: str, seed: int, scale: float, other: float) -> None:
    states, keep = 3, torch.tensor([True, False, True])
    C, h = inputs("full", seed, 9, states), inputs(kind, seed + 1, 27, 7).view(9, 3, 7)  # 2 * 3 + 1 pairs
    start = torch.eye(states, dtype=torch.float64)[:, keep]
    write, read = remix(full_of(scale * C, other * h), keep, start)
    want = remix(full_of(C, h), keep, start)
    same(write, want[0], 1e-5)
    same(read, want[1], 1e-5)
    if not h.any():
        assert torch.equal(write, start.T) and torch.equal(read, start)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    full = torch.ones(2, 2, 2, 2, dtype=torch.float64)
    full[0, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        readout(full, torch.tensor([False, True]))
    states = StateMoments(1)
    states.add(torch.full((1, 1, 1, 2), 1e30), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="not finite"):
        states.result()
    norm = InputNorm()
    norm.add(torch.full((1, 1, 2), 1e30))
    with pytest.raises(ValueError, match="not finite"):
        norm.result()


@settings(deadline=None, max_examples=40)
@given(kind=KINDS, other=KINDS, seed=SEEDS, r=st.integers(1, 5), scale=SCALES)
def test_balanced_truncation_of_what_hardly_moves(
    kind: str, other: str, seed: int, r: int, scale: float
) -> None:
    """The largest directions, by the eigenvalues of the product, in any unit; zeros where none is left."""
    h, C = inputs(kind, seed, 20, 5), inputs(other, seed + 1, 20, 5)
    p, q = (scale * h).T @ (scale * h), C.T @ C / scale
    nothing = torch.empty(0)
    sums = StateSums(nothing, nothing, p[None], q[None], None)
    maps = balanced_truncation(sums, r)
    assert all(torch.isfinite(part).all() and part.shape == (1, r, 5) for part in maps)
    want = torch.linalg.eigvals(h.T @ h @ C.T @ C).real.clamp(min=0).sort(descending=True).values * scale
    same(energies(sums), want, 1e-6)
    if not p.any() or not q.any():
        assert not any(part.any() for part in maps)


@settings(deadline=None, max_examples=40)
@given(kind=KINDS, seed=SEEDS, scale=SCALES)
def test_exact_scores_and_the_refit_of_d(kind: str, seed: int, scale: float) -> None:
    """Sums of errors (D, N) against an input, as the kernels give them."""
    error, u = scale * inputs(kind, seed, 40, 6).view(40, 1, 6), scale * inputs("full", seed, 40, 1)
    if kind == "zero":
        u = u * 0
    seen = ErrorSums(
        torch.einsum("tdn,tdm->dnm", error, error),
        torch.einsum("tdn,td->dn", error, u),
        u.square().sum(0),
        1.0,
    )
    rule = Rule(METHODS["exact"], Unstructured(), 0.5, "memoryless")
    scores = METHODS["exact"].score(torch.zeros(1, 6), seen, rule, slice(None))
    assert not scores.isnan().any() and len(set(scores[0].tolist())) == 6
    assert torch.isfinite(elimination_scores(seen.gram, 6, 6)).all()
    change = refit_skip(seen, torch.zeros(1, 6, dtype=torch.bool))
    want = torch.linalg.pinv(u) @ error[:, 0].sum(1, keepdim=True)
    same(change, want[0], 2e-6)


# ------------------------------------------------------------------------------------ whole units


@settings(deadline=None, max_examples=30)
@given(kind=KINDS, seed=SEEDS, scale=SCALES, silent=st.booleans(), width=st.integers(1, 3))
def test_elimination_of_columns(kind: str, seed: int, scale: float, silent: bool, width: int) -> None:
    units = 5
    x = scale * inputs(kind, seed, 8, units * width)
    weight = inputs("zero" if silent else "full", seed + 1, 4, units * width)
    columns = torch.arange(units * width).view(units, width)
    reader = Reader(weight, None, Moments(x.T @ x / 8), columns)
    (scores,), costs = elimination(Units([units], units - 1, readers=[reader]))
    assert torch.isfinite(costs).all() and (costs >= -1e-9 * costs.abs().max()).all()
    assert sorted(scores.tolist()) == [0, 1, 2, 3, math.inf]
    if silent:
        assert not costs.any()


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=SCALES, other=SCALES)
def test_the_cosine_of_vectors_of_any_length(seed: int, scale: float, other: float) -> None:
    a, b = inputs("full", seed, 4, 6), inputs("full", seed + 1, 4, 6)
    want = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    same(cosine(scale * a, other * b), want, 1e-9)
    nothing = torch.zeros(4, 6)
    assert not cosine(a, nothing).any() and (cosine(nothing, nothing) == 1).all()
    tiny = torch.full((1, 6), 1e-45)  # of float32, the smallest there is
    same(cosine(tiny, tiny), torch.ones(1, dtype=torch.float64), 1e-12)


def test_a_curve_through_trials_that_say_little() -> None:
    at = [Trial("state", size, saved, loss) for size, saved, loss in ((4, 100, 0.1), (2, 200, 0.4))]
    assert predicted(at, 400) == pytest.approx(1.6)
    alike = [Trial("state", 4, 100, 0.1), Trial("state", 3, 100, 0.2)]
    assert predicted(alike, 200) == pytest.approx(0.2)
    assert predicted([Trial("state", 4, 0, 0.1)], 100) == math.inf
    assert predicted([Trial("state", 4, 100, math.nan), at[1]], 200) == pytest.approx(0.4)


# ----------------------------------------------------------------------------------- whole models


def silenced(kind: Any, what: str) -> Any:
    """A pico model in which something carries nothing, or next to nothing."""
    model = kind()
    first = model.backbone.layers[0]
    with torch.no_grad():
        if what == "one text":
            model.backbone.embeddings.weight[:] = model.backbone.embeddings.weight[0].clone()
        elif what == "nothing at all":
            for weight in model.parameters():
                weight.zero_()
        elif what == "no input":
            first.norm.weight.zero_()
        elif what == "no output":
            first.mixer.out_proj.weight.zero_()
        else:
            size = {"1e-20": 1e-20, "1e-30": 1e-30, "1e-44": 1e-44}[what]
            first.norm.weight.mul_(size)
    return model


SILENCES = ["one text", "nothing at all", "no input", "no output", "1e-20", "1e-30", "1e-44"]
RUNS = [
    {},
    {"method": "sparsegpt", "target": "projections"},
    {"pattern": "structured:state", "sparsity": 0.5},
    {"pattern": "structured:channel", "sparsity": 0.5},
    {"pattern": "structured:block", "sparsity": 0.5},
    {"pattern": "structured:block", "sparsity": 0.5, "method": "cosine"},
]


@pytest.mark.parametrize("kind", [pico_mamba, pico_mamba2])
@pytest.mark.parametrize("what", SILENCES)
def test_models_in_which_something_is_silent(kind: Any, what: str) -> None:
    for fields in RUNS + [{"pattern": "structured:state", "method": "balanced"}] * (kind is pico_mamba2):
        model = silenced(kind, what)
        recipe = Recipe(**fields).resolved(model="pico", trained_length=40)
        report = prune(adapt(model), recipe, TOKENS)
        assert all(torch.isfinite(weight).all() for weight in model.parameters()), fields
        assert sum(row.pruned for row in report.rows) > 0
        with torch.inference_mode():
            assert torch.isfinite(model(TOKENS, use_cache=False).logits).all(), fields
