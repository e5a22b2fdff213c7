"""Stages 3 and 4 in one loop: `sweep` masks a matrix and repairs what survives, some columns at a time. The
only place that computes changes of weights which survive.

Without a factor the sweep only masks: magnitude, Wanda, and every score for A_log. With the factor of the
inverse Hessian it is optimal brain surgery in the order of columns (SparseGPT, Frantar & Alistarh, arXiv
2301.00774): what a removed weight did is made up for by the columns to its right. With a grid (grids.py)
what stays is rounded in the same step, and what that costs is handed on with it (GPTQ, arXiv 2210.17323).
`refit` then repairs in both directions; on a grid, on_grid.py does. Formulas in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsessm.methods.grids import MANY, Rounder
from sparsessm.methods.hessian import Factor, near
from sparsessm.methods.observers import ErrorSums, Moments
from sparsessm.methods.patterns import NofM, Pattern

# Share of the mean channel's power added to every channel's: D of a channel whose gate hardly ever opens
# would otherwise be fitted to nothing and grow without bound.
SKIP_DAMPING = 1e-6
WIDTH = 128  # columns whose errors are handed on together (SparseGPT's lazy batches)
ROUNDS = 8  # of inputs and readouts in turn, in `remix`
READOUT_DAMPING = 1e-3  # share of the mean diagonal, in `readout` and `remix`
STEPS = 10  # of conjugate gradients in `refit`

# (columns [out, width] as they are now, their place) -> scores [out, width]; the smallest are removed.
Score = Callable[[Tensor, slice], Tensor]


def sweep(
    weight: Tensor,
    score: Score,
    pattern: Pattern,
    sparsity: float,
    factor: Factor | None = None,
    width: int = WIDTH,
    *,
    by_row: bool = False,
    gone: Tensor | None = None,
    rounding: Rounder | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask a matrix from left to right and round what stays; with a factor, what each weight lost is made up
    for on its right.

    Args:
        weight: (out, in), the weights to approach. score: sees the columns as earlier repairs left them.
        pattern, sparsity: unstructured: the share of every `width` columns, chosen when the sweep arrives
            there; N:M: group by group.
        factor: of the inverse Hessian, in the weight's dtype; (in, in) or one for each row. Without one the
            whole matrix is masked at once.
        width: columns masked together.
        by_row: the same share of every row.
        gone: (out, in) bool: removed before; goes first and stays removed.
        rounding: to a grid; None: what stays keeps its value.

    Returns:
        The weights (out, in), zero where removed, and the keep-mask.
    """
    out, columns = weight.shape
    if factor is None:
        batch = chosen = columns
    else:
        chosen = pattern.m if isinstance(pattern, NofM) else width
        batch = max(WIDTH // chosen, 1) * chosen
        if rounding is not None and rounding.group < columns:  # groups do not reach over a batch
            batch = math.lcm(chosen, rounding.group)
    lanes = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column is contiguous
    keep = torch.empty(columns, out, dtype=torch.bool, device=weight.device)

    def mask(part: slice) -> Tensor:
        return _mask(score(lanes[part].T, part), pattern, sparsity, by_row, gone, part)

    for start in range(0, columns, batch):
        block = slice(start, min(start + batch, columns))
        errors = torch.zeros_like(lanes[block])
        for first in range(block.start, block.stop, chosen):
            part = slice(first, min(first + chosen, block.stop))
            keep[part] = mask(part).T
            if factor is None and rounding is None:
                continue
            for column in range(part.start, part.stop):
                if rounding is not None and column % rounding.group == 0:
                    group = slice(column, min(column + rounding.group, columns))
                    if group.stop > part.stop:  # as they would be masked now
                        rest = slice(part.stop, group.stop)
                        keep[rest] = mask(rest).T
                    rounding.reach(lanes[group].T, keep[group].T, group)
                _settle(lanes, keep[column], rounding, factor, column, block, errors)
        if factor is not None and block.stop < columns:
            _push(lanes[block.stop :], factor.upper[..., block, block.stop :], errors)
    return (lanes * keep).T.contiguous(), keep.T.contiguous()


def _mask(
    score: Tensor, pattern: Pattern, sparsity: float, by_row: bool, gone: Tensor | None, part: slice
) -> Tensor:
    """(out, width) bool keep-mask."""
    if gone is not None:
        # Removing what was removed before costs nothing, whatever a score makes of the value stored for it.
        score = score.masked_fill(gone[:, part], -torch.inf)
    keep = pattern.keep(score[:, None], sparsity)[:, 0] if by_row else pattern.keep(score, sparsity)
    return keep if gone is None else keep & ~gone[:, part]


def _settle(
    lanes: Tensor,
    keep: Tensor,
    rounding: Rounder | None,
    factor: Factor | None,
    column: int,
    block: slice,
    errors: Tensor,
) -> None:
    """Give a column its final values; the columns to the right, up to the block's end, make up for it."""
    lane = lanes[column]
    settled = lane.masked_fill(~keep, 0.0) if rounding is None else rounding.round(lane, keep, column)
    if factor is not None:
        upper = factor.upper
        error = (lane - settled) / upper[..., column, column]  # (out,)
        errors[column - block.start] = error
        right = slice(column + 1, block.stop)
        if upper.ndim == 2:
            lanes[right].addr_(upper[column, right], error, alpha=-1)
        else:
            lanes[right] -= upper[:, column, right].T * error
    lane.copy_(settled)


def _push(lanes: Tensor, upper: Tensor, errors: Tensor) -> None:
    """What a block's removals ask of all columns right of it; upper ([out,] width, right)."""
    if upper.ndim == 2:
        lanes.addmm_(upper.T, errors, alpha=-1)
    else:
        lanes -= torch.einsum("owr,wo->ro", upper, errors)


def dense_target(
    weight: Tensor, seen: Moments, factor: Factor, strength: float = 1.0, start: Tensor | None = None
) -> Tensor:
    """The weights with which the layer, fed by the pruned model, comes nearest to its dense output.

    argmin ||V X~ - W X||^2 + added ||V - W||^2 = W (X X~' + added I) (X~ X~' + added I)^-1, X being the
    inputs in the dense model and X~ those in the pruned one; the damping pulls towards W, so that nothing
    changes where the inputs are the same. The same aim in quantisation: GPTAQ (arXiv 2504.02692).

    Args:
        weight: (out, in), the dense W. strength: 0 is W itself, 1 the full solution.
        start: (out, fewer in) where inputs were taken out: what is pulled towards, instead of W.

    Returns:
        (out, in) in the weight's dtype; columns of dead inputs are those of W.
    """
    assert seen.cross is not None
    start, cross = weight if start is None else start, seen.cross.to(weight.dtype)
    if len(weight) <= MANY:
        return _nearest(weight, start, cross, factor, strength)
    found = torch.empty_like(start)
    for part, old, new in zip(weight.split(MANY), start.split(MANY), found.split(MANY), strict=True):
        new.copy_(_nearest(part, old, cross, factor, strength))
    return found


def _nearest(weight: Tensor, start: Tensor, cross: Tensor, factor: Factor, strength: float) -> Tensor:
    upper = factor.upper
    solved = _times(weight, cross) + factor.added * start
    solved = _times(_times(solved, upper.mT), upper)
    return start + strength * (solved - start).masked_fill(factor.dead, 0.0)


def readout(full: Tensor, keep: Tensor, damping: float = READOUT_DAMPING) -> Tensor:
    """The readouts of the kept states that restore the output of all: C'_k = sum_n Z_nk C_n.

    The output is sum_n C_n h_n in every channel and step; least squares over the products C_n h_k of every
    readout with every kept state, pulled towards C'_k = C_k.

    Args:
        full: (N, N, N, N) float64, `StateSums.full` of one group. keep: (N,) bool, r of them True.

    Returns:
        Z (N, r) float64.
    """
    states, kept = len(keep), keep.nonzero()[:, 0]
    some = full[:, :, kept][..., kept]  # [n, n', k, k']
    products = some.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # [(n, k), (n', k')]
    wanted = torch.einsum("apak->pk", full[..., kept]).flatten()  # sum_n full[n, n', n, k'], [(n', k')]
    start = torch.eye(states, dtype=torch.float64, device=full.device)[:, kept].flatten()
    return _ridge(products, wanted, start, damping).view(states, len(kept))


def remix(
    full: Tensor, keep: Tensor, read: Tensor, damping: float = READOUT_DAMPING, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Inputs and readouts of the kept states that restore the output of all: B'_k = sum_m M_km B_m,
    C'_k = sum_n Z_nk C_n.

    The output is linear in either while the other is fixed: least squares in turn, each pulled towards what
    there was.

    Args:
        full: (N, N, pairs, pairs) float64, `PairMoments.result`: first the pairs (decay k, input m) of every
            kept k with all m, then those (n, n) of the removed n. keep: (N,) bool, r of them True.
        read: Z (N, r), the start.

    Returns:
        M (r, N) and Z (N, r), float64.
    """
    states, kept, gone = len(keep), keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    r = len(kept)
    # the whole output: C_n of every n with the pair (n, n)
    own = torch.empty_like(keep, dtype=torch.int64)
    own[kept] = torch.arange(r, device=keep.device) * states + kept
    own[gone] = r * states + torch.arange(len(gone), device=keep.device)
    made = full[:, :, : r * states, : r * states].unflatten(2, (r, states)).unflatten(4, (r, states))
    # [(k, l), (m, n), (n', n'')], laid out once: every round reads it twice, in order, and copies nothing
    made = made.permute(2, 4, 3, 5, 0, 1).reshape(r * r, states**2, states**2)
    crossed = torch.stack([full[n, :, own[n], : r * states] for n in range(states)]).sum(0)
    crossed = crossed.unflatten(1, (r, states))  # [n', k, m]: whole output against C_n' h_km
    start = torch.eye(states, dtype=torch.float64, device=full.device)
    write, read_start = start[kept], start[:, kept]
    for _ in range(rounds):
        both = torch.einsum("ak,bl->klab", read, read).reshape(r * r, states**2, 1)
        products = (made @ both).view(r, r, states, states).transpose(1, 2).flatten(0, 1).flatten(1)
        wanted = torch.einsum("akm,ak->km", crossed, read).flatten()
        write = _ridge(products, wanted, start[kept].flatten(), damping).view(r, states)
        both = torch.einsum("km,ln->klmn", write, write).reshape(r * r, 1, states**2)
        products = (both @ made).view(r, r, states, states).permute(2, 0, 3, 1).flatten(0, 1).flatten(1)
        wanted = torch.einsum("akm,km->ak", crossed, write).flatten()
        read = _ridge(products, wanted, read_start.flatten(), damping).view(states, r)
    return write, read


def _ridge(products: Tensor, wanted: Tensor, start: Tensor, damping: float) -> Tensor:
    """argmin x' products x - 2 wanted' x + added |x - start|^2; `start` where there is nothing to fit.

    Raises:
        ValueError: sums that are not finite.
    """
    if not (torch.isfinite(products).all() and torch.isfinite(wanted).all()):
        raise ValueError("sums over its states are not finite")
    mean = products.diagonal().mean() if len(products) else products.new_zeros(())
    if not mean > 0:
        return start.clone()
    # In units of the mean: what is added is then never lost beside it, whatever the unit of the states.
    damped = products / mean
    damped.diagonal().add_(damping)
    return torch.linalg.solve(damped, wanted / mean + damping * start)


def readout_error(full: Tensor, keep: Tensor, mix: Tensor) -> float:
    """What `readout` leaves of the output's error, in the unit of `full`."""
    kept = keep.nonzero()[:, 0]
    whole = torch.einsum("abab->", full)
    wanted = torch.einsum("apak->pk", full[..., kept])
    again = torch.einsum("nmkl,nk,ml->", full[:, :, kept][..., kept], mix, mix)
    return float(whole - 2 * (wanted * mix).sum() + again)


def refit(
    weight: Tensor, goal: Tensor, gram: Tensor, factor: Factor, keep: Tensor, steps: int = STEPS
) -> Tensor:
    """Repair all survivors at once, the mask being fixed: minimise tr (V - goal) (H + added I) (V - goal)'.

    The sweep can only repair to the right of what it removes. A few steps of conjugate gradients on the
    survivors of all rows together, preconditioned by the diagonal, bring most of what the exact least squares
    of each row would (ALPS, Meng et al., arXiv 2406.07831, does so after its own choice of mask).

    Args:
        weight: (out, in), the start. goal: (out, in), the weights to approach.
        gram: H, (in, in) or (out, in, in). keep: (out, in) bool.
    """
    # Rows are brought near 1 by powers of two, which rounds nothing: tiny weights converge like others.
    most = torch.maximum(weight.abs().amax(1, keepdim=True), goal.abs().amax(1, keepdim=True))
    unit = near(most, weight.dtype).to(weight.dtype)
    weight, goal = weight / unit, goal / unit
    scale = 1 / (gram.diagonal(dim1=-2, dim2=-1) + factor.added).masked_fill(factor.dead, 1.0)

    def hessian(direction: Tensor) -> Tensor:
        return (_times(direction, gram) + factor.added * direction) * keep

    rest = hessian(goal - weight)
    step = rest * scale
    direction, power = step.clone(), (rest * step).sum(1, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    for _ in range(steps):
        image = hessian(direction)
        length = power / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        weight = weight + length * direction
        rest = rest - length * image
        step = rest * scale
        power, before = (rest * step).sum(1, keepdim=True), power
        direction = step + power / before.clamp(min=tiny) * direction
    return weight * unit


def output_error(change: Tensor, gram: Tensor) -> float:
    """tr(change H change'): mean energy that a change of the weights (out, in) adds to the layer's output."""
    if gram.ndim == 2 and len(change) > MANY:
        return sum(output_error(part, gram) for part in change.split(MANY))
    return float((_times(change, gram) * change).sum())


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (out, in) @ matrix (in, in), or each row with a matrix of its own (out, in, in)."""
    return rows @ matrix if matrix.ndim == 2 else (rows[:, None] @ matrix)[:, 0]


def damped_power(seen: ErrorSums) -> Tensor:
    """(D,) float64, positive: the denominator of the least squares for D."""
    assert seen.power is not None, "there is no D"
    floor = SKIP_DAMPING * seen.power.mean()
    return seen.power + floor.clamp(min=1e-300)


def refit_skip(seen: ErrorSums, keep: Tensor) -> Tensor:
    """The change of D that best absorbs what the removed entries of A_log took from the layer's output.

    The error of channel d is sum_{n removed} e_n(t); the part of it that is proportional to the input u can
    be put back through the skip weight D, at no cost. Least squares in closed form, per channel, damped:
    change = (sum_{n removed} r_n) / q.

    Args:
        seen: sums over the calibration windows, with the full Gram. keep: (D, N) bool.

    Returns:
        (D,) float64, to be added to D.
    """
    assert seen.cross is not None, "there is no D"
    return (seen.cross * ~keep).sum(1) / damped_power(seen)


def error_of(seen: ErrorSums, keep: Tensor, skip_change: Tensor | None = None) -> float:
    """Output error of a mask in residual-stream units: sum_d 1' G 1 over the removed entries.

    Args:
        seen: sums over the calibration windows, with the full Gram. keep: (D, N) bool.
        skip_change: (D,) what a refit adds to D; the error is then that of mask and refit together.
    """
    removed = (~keep).double()
    error = (removed[:, None, :] @ seen.gram @ removed[:, :, None]).flatten()
    if skip_change is not None:
        assert seen.cross is not None and seen.power is not None, "there is no D"
        error = error - 2 * skip_change * (seen.cross * removed).sum(1) + skip_change.square() * seen.power
    return float(error.sum())
