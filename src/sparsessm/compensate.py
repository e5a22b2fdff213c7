"""Stage 4, repair. The only place that computes changes of weights which survive."""

from __future__ import annotations

from torch import Tensor

from sparsessm.observers import ErrorSums

# Share of the mean channel's power added to every channel's: D of a channel whose gate hardly ever opens
# would otherwise be fitted to nothing and grow without bound.
DAMPING = 1e-6


def damped_power(seen: ErrorSums) -> Tensor:
    """(D,) float64, positive: the denominator of the least squares for D."""
    floor = DAMPING * seen.power.mean()
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
        error = error - 2 * skip_change * (seen.cross * removed).sum(1) + skip_change.square() * seen.power
    return float(error.sum())
