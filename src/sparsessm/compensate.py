"""Stage 4, repair. The only place that changes weights which survive."""

from __future__ import annotations

from torch import Tensor

from sparsessm.observers import ErrorSums


def refit_skip(seen: ErrorSums, keep: Tensor) -> Tensor:
    """The change of D that best absorbs what the removed entries of A_log took from the layer's output.

    The error of channel d is sum_{n removed} e_n(t); the part of it that is proportional to the input u can
    be put back through the skip weight D, at no cost. Least squares in closed form, per channel:
    change = (sum_{n removed} r_n) / q.

    Args:
        seen: sums over the calibration windows. keep: (D, N) bool.

    Returns:
        (D,) float64, to be added to D; zero where the input carries nothing.
    """
    lost = (seen.cross * ~keep).sum(1)
    return (lost / seen.power).where(seen.power > 0, 0.0)


def error_of(seen: ErrorSums, keep: Tensor, *, refit: bool) -> float:
    """Output error of a mask in residual-stream units: sum_d 1' G 1, less what the refit absorbs.

    From a diagonal Gram it is the diagonal's part only.
    """
    removed = (~keep).double()
    if seen.gram.ndim == 2:
        return float((seen.gram * removed).sum())
    error = (removed[:, None, :] @ seen.gram @ removed[:, :, None]).flatten()
    if refit:
        lost = (seen.cross * removed).sum(1)
        error = error - (lost.square() / seen.power).where(seen.power > 0, 0.0)
    return float(error.sum())
