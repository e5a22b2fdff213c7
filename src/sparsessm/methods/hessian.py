"""Stage 1, the Hessian of a linear layer's output error, factored for the sweep (repair.py).

H = mean x x' over the calibration tokens, damped as in GPTQ and SparseGPT (arXiv 2210.17323, 2301.00774). A
layer with dead or dependent inputs has a singular H: the damping grows until the factorisation succeeds, and
how much it took is reported. It never turns into the identity behind the user's back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # share of the mean diagonal added to the diagonal, SparseGPT's `percdamp`
MOST_DAMPING = 1e4


@dataclass(frozen=True)
class Factor:
    """(H + added I)^-1 = U' U.

    Attributes:
        upper: U, (in, in), or (out, in, in) for a depthwise layer; upper triangular.
        damping: the share of the mean diagonal that it took.
        added: what was added to the diagonal, (1,) or (out, 1).
        dead: (in,) or (out, in) bool: inputs that were zero in every window.
    """

    upper: Tensor
    damping: float
    added: Tensor
    dead: Tensor

    @property
    def pivots(self) -> Tensor:
        """(in,) or (out, in): U_jj; w_j^2 / U_jj^2 is what removing weight j costs, those left of it
        fixed."""
        return self.upper.diagonal(dim1=-2, dim2=-1)

    @property
    def inverse_diagonal(self) -> Tensor:
        """(in,) or (out, in): diagonal of the inverse; w_j^2 / it is what removing weight j alone costs."""
        return self.upper.square().sum(-2)


def factorise(gram: Tensor, damping: float = DAMPING) -> Factor:
    """Factor the inverse of a Hessian, in its dtype.

    Dead inputs get the mean diagonal of the others, so that they touch none of them and the damping does not
    depend on the unit of the inputs (SparseGPT's code puts 1 there, and 1 may be far above or below all
    others). The damping is ten times larger after each failure.

    Args:
        gram: (..., in, in), symmetric, positive semidefinite up to rounding.

    Raises:
        ValueError: not finite, or not positive definite with any damping up to `MOST_DAMPING`.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("its Hessian is not finite")
    power = gram.diagonal(dim1=-2, dim2=-1)
    dead = power <= 0
    mean = power.clamp(min=0).sum(-1, keepdim=True, dtype=torch.float64) / (~dead).sum(-1, keepdim=True)
    unit = near(mean, gram.dtype)  # (..., 1); H / unit is factored: no unit of the inputs is too large
    mean = (mean.nan_to_num(1.0) / unit).to(gram.dtype)  # NaN: no living input
    unit = unit.to(gram.dtype)
    diagonal = torch.where(dead, mean, power / unit)
    while damping <= MOST_DAMPING:
        added = damping * mean
        # Reversing rows and columns turns LAPACK's lower factor into an upper one: H = R R', H^-1 = R^-T
        # R^-1.
        damped = gram.flip(-1, -2).div_(unit[..., None])
        damped.diagonal(dim1=-2, dim2=-1).copy_((diagonal + added).flip(-1))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a large model's Hessian is 100 MB
        if not failed.any():
            root = lower.flip(-1, -2)
            del lower
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
            upper = torch.linalg.solve_triangular(root, eye, upper=True).div_(unit.sqrt()[..., None])
            if torch.isfinite(upper).all():
                return Factor(upper, damping, added * unit, dead)
        damping = 10 * damping or DAMPING
    raise ValueError(f"its Hessian is not positive definite even with damping {MOST_DAMPING:g}")


def by_power(gram: Tensor) -> Tensor:
    """(in,) the columns in the order of their diagonal, the largest first: what is swept last is made up for
    by the fewest, so it should matter least (GPTQ's act-order)."""
    return gram.diagonal().argsort(descending=True, stable=True)


def near(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The powers of four near to positive values, 1 for all others; float64, but normal numbers of `dtype`.

    Dividing by one, or by its root, rounds nothing, and leaves a value between a half and two.
    """
    values = values.double()
    usual = torch.isfinite(values) & (values > 0)
    exponents = torch.frexp(torch.where(usual, values, 1.0)).exponent
    limits = torch.finfo(dtype)
    low, high = (math.frexp(limit)[1] for limit in (limits.tiny, limits.max))
    exponents = 2 * torch.div(exponents.clamp(low + 2, high - 2), 2, rounding_mode="floor")
    return torch.ldexp(torch.ones_like(values), exponents)
