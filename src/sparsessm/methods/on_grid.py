"""Stage 4, the repair of a matrix that stays on its grid, in place of `repair.refit`.

Codes by coordinate descent, then scales by least squares, both towards the same goal and under the same
Hessian as the sweep. New levels are returned; none is changed. Formulas in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsessm.methods.grids import MANY, Rounding
from sparsessm.methods.hessian import Factor
from sparsessm.methods.levels import Levels, as_factors, as_scales

PASSES = 2  # of coordinate descent
ROUNDS = 3  # of row and column factors in turn
BLOCK = 32  # columns after which what they changed reaches all others, by one product
TOGETHER = 4096  # rows of a matrix that are worked on at once: a vocabulary has many
MOST = 1 << 26  # numbers that scales are found from at once
FARTHEST = 2.0  # a fit changes a scale by this factor at most
RIDGE = 1e-3  # share of the mean diagonal, in the least squares of column factors

# (wanted values of a column in units of their scales, what an error costs there, of which rows) -> codes.
Nearest = Callable[[Tensor, Tensor, slice], Tensor]


def refit(
    levels: Levels, goal: Tensor, gram: Tensor, factor: Factor, keep: Tensor, rounding: Rounding
) -> Levels:
    """Repair a matrix on its grid, the mask being fixed; as `repair.refit`.

    Args:
        levels: as the sweep left them. goal: (out, in), the weights to approach. gram: H, (in, in).
        keep: (out, in) bool, what the mask keeps; more may be zero. rounding: that of the sweep.
    """
    hessian = damped(gram, factor)
    if levels.columns is not None:
        levels = fit_factors(levels, goal, hessian, rounding.prices)
    costs = hessian.diagonal() * factor.pivots.square()
    levels = descend(levels, goal, hessian, keep, rounding.nearest, costs)
    if levels.columns is not None:
        return fit_factors(levels, goal, hessian, rounding.prices)
    return fit_groups(levels, goal, hessian)


def damped(gram: Tensor, factor: Factor) -> Tensor:
    """H + added I, as the sweep's factor has it; (in, in)."""
    power = gram.diagonal()
    return gram + torch.diag(torch.where(factor.dead, 1.0, 0.0) * power.mean() + factor.added)


def descend(
    levels: Levels,
    goal: Tensor,
    hessian: Tensor,
    keep: Tensor,
    nearest: Nearest,
    costs: Tensor | None = None,
    passes: int = PASSES,
) -> Levels:
    """Other codes on the same grid: each column in turn takes the nearest to what the others ask of it.

    With R = (W - goal) H the error is least at w_j - R_j / H_jj, the other columns being fixed, so a step
    never makes it larger; with a thrifty grid, never the error and what its bits are worth together.

    Args:
        goal: (out, in). hessian: (in, in), positive definite. keep: (out, in) bool, what may be other than 0.
        nearest: the codes of a column. costs: (in,), H_jj in units of 1 / U_jj^2; 1 if None.
    """
    costs = torch.ones_like(goal[0]) if costs is None else costs
    found = torch.empty_like(levels.codes)
    for first in range(0, len(goal), TOGETHER):
        rows = slice(first, first + TOGETHER)
        some = replace(levels, codes=levels.codes[rows], rows=levels.rows[rows])
        codes = some.codes.T.to(goal.dtype).contiguous()  # (in, rows)
        scales = some.scales().T.to(goal.dtype).expand(codes.shape).contiguous()
        lanes, kept, power = codes * scales, keep[rows].T.contiguous(), hessian.diagonal()
        rest = hessian @ (lanes - goal[rows].T)
        for block in (slice(at, at + BLOCK) for _ in range(passes) for at in range(0, len(lanes), BLOCK)):
            near, before = rest[block].clone(), lanes[block].clone()
            for own, mutual in zip(range(*block.indices(len(lanes))), hessian[block, block], strict=True):
                asked, lane = near[own - block.start], lanes[own]
                wanted = (lane - asked / power[own]) / scales[own]
                codes[own] = torch.where(kept[own], nearest(wanted, costs[own], rows), 0.0)
                value = codes[own] * scales[own]
                near.addr_(mutual, value - lane)
                lane.copy_(value)
            rest.addmm_(hessian[:, block], lanes[block] - before)
        found[rows] = codes.T.short()
    return replace(levels, codes=found)


def fit_groups(levels: Levels, goal: Tensor, hessian: Tensor) -> Levels:
    """The scales of all groups of a row together, by least squares; codes stay.

    A row keeps its scales where the fit would turn the sign of one or more than double it.
    """
    groups = levels.rows.shape[1]
    hessian = hessian.double()
    pieces = [slice(at * levels.group, (at + 1) * levels.group) for at in range(groups)]
    scales = []
    together = max(1, MOST // (groups * len(hessian)))
    for codes, aim, old in zip(*(x.split(together) for x in (levels.codes, goal, levels.rows)), strict=True):
        codes, old = codes.double(), old.double()
        images = torch.stack([codes[:, piece] @ hessian[piece] for piece in pieces], 1)  # (out, groups, in)
        parts = [(images[..., piece] * codes[:, None, piece]).sum(-1) for piece in pieces]
        products = torch.stack(parts, -1)
        wanted = (images * aim.double()[:, None]).sum(-1)  # (out, groups)
        damp = 1e-8 * products.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-300)
        products.diagonal(dim1=1, dim2=2).add_(damp)
        found = torch.linalg.solve(products, wanted + damp * old)
        change = found / old  # scales of blocks may be negative
        fine = torch.isfinite(found) & (change > 1 / FARTHEST) & (change < FARTHEST)
        scales.append(as_scales(torch.where(fine.all(1, keepdim=True), found, old)))
    return replace(levels, rows=torch.cat(scales))


def fit_factors(
    levels: Levels, goal: Tensor, hessian: Tensor, prices: Tensor | None = None, rounds: int = ROUNDS
) -> Levels:
    """Row and column factors in turn, each by least squares with the other fixed; codes stay.

    Rows: a_i = <z_i, V_i> / <z_i, z_i> under H. Columns: (H o W'FW) g = diag(W'F V H), damped towards 1.
    Factors are coarse: where rounding them loses what the fit gains, they stay.
    """
    hessian = hessian.double()
    costs = torch.ones_like(levels.rows[:, 0], dtype=torch.float64) if prices is None else prices
    rows, columns = _factors(levels)
    some = _heaviest(goal, costs)
    columns = _fitted_columns(
        levels.codes[some], rows[some], columns, goal[some], hessian, costs[some], rounds
    )
    found = with_factors(levels, rows, columns)
    before, power, aim = [], [], []
    for first in range(0, len(goal), TOGETHER):
        part = slice(first, first + TOGETHER)
        wanted, old, new = goal[part].double() @ hessian, values(levels, part), values(found, part)
        before.append((((old @ hessian - 2 * wanted) * old) * costs[part, None]).sum())
        power.append(((new @ hessian) * new).sum(1))
        aim.append((wanted * new).sum(1))
    powers, aims = torch.cat(power), torch.cat(aim)
    rows, columns = _factors(found)
    fitted = with_factors(levels, rows * _least(powers, aims), columns)
    new_rows, new_columns = _factors(fitted)
    scale = new_rows / rows * (new_columns[0] / columns[0])  # columns change by a power of two at most
    after = (costs * scale * (scale * powers - 2 * aims)).sum()
    return fitted if after < sum(before) else levels


def _factors(levels: Levels) -> tuple[Tensor, Tensor]:
    """(out,), (in,) float64."""
    assert levels.columns is not None
    return levels.rows[:, 0].double(), levels.columns.double()


def _heaviest(goal: Tensor, costs: Tensor) -> Tensor | slice:
    """Rows whose errors say what columns should be: all, or those of most power times price."""
    if len(goal) <= MANY:
        return slice(None)
    return (costs * torch.linalg.vector_norm(goal, dim=1).square()).topk(MANY).indices


def _fitted_columns(
    codes: Tensor, rows: Tensor, columns: Tensor, goal: Tensor, hessian: Tensor, costs: Tensor, rounds: int
) -> Tensor:
    """The columns' factors (in,) after so many rounds; codes and goal are of the `rows` that say them."""
    parts = [slice(first, first + TOGETHER) for first in range(0, len(goal), TOGETHER)]
    kept = goal.numel() <= MOST // 2  # what is wanted of the rows, the same in every round
    aims = [goal[part].double() @ hessian for part in parts] if kept else [None] * len(parts)
    rows = rows.clone()
    for _ in range(rounds):
        products, target = torch.zeros_like(hessian), torch.zeros_like(columns)
        for part, aim in zip(parts, aims, strict=True):
            wanted = goal[part].double() @ hessian if aim is None else aim
            value = codes[part].double() * rows[part, None] * columns
            change = _least(((value @ hessian) * value).sum(1), (wanted * value).sum(1))
            rows[part], value = rows[part] * change, value * change[:, None]
            priced = costs[part, None] * value
            products += value.T @ priced
            target += (priced * wanted).sum(0)
        products *= hessian
        damp = RIDGE * products.diagonal().mean().clamp(min=1e-300)
        products.diagonal().add_(damp)
        columns = columns * torch.linalg.solve(products, target + damp).clamp(1 / FARTHEST, FARTHEST)
    return columns


def _least(power: Tensor, aim: Tensor) -> Tensor:
    """By what rows (rows,) should change for the least error."""
    change = torch.where(power > 0, aim / power.clamp(min=1e-300), 1.0)
    return change.clamp(1 / FARTHEST, FARTHEST)


def values(levels: Levels, rows: slice) -> Tensor:
    """(rows, in) float64, of some of the rows."""
    return replace(levels, codes=levels.codes[rows], rows=levels.rows[rows]).values().double()


def with_factors(levels: Levels, rows: Tensor, columns: Tensor) -> Levels:
    """The same codes with other factors (out,), (in,), as near to these as there are."""
    new_rows, new_columns = as_factors(rows, columns)
    return replace(levels, rows=new_rows[:, None], columns=new_columns)
