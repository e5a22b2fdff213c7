"""Balanced truncation of a group's states (Moore 1981): the best directions, in place of some of the states.

With one decay for all states of a head any linear map of the state commutes with the recurrence. What
dropping directions costs is tr Q (I - Pi) P (I - Pi)', if states and readouts vary apart from each other:
P = E[sum_d w_d h_d h_d'], Q = E[C C'], Pi the projection. In the basis where P and Q are the same diagonal
matrix S that is the sum of S_i^2 over the directions that go (docs/structured.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsessm.methods.hessian import near
from sparsessm.methods.observers import StateSums

RANK = 1e-10  # of the largest eigenvalue: what is below it is zero


def energies(sums: StateSums) -> Tensor:
    """(N,) float64, descending: what each direction carries into the layer's output, all groups together."""
    p, q = (_powers(matrix)[0] for matrix in (sums.states, sums.readouts))
    return torch.linalg.svdvals(p @ q).square().sum(0)


def balanced_truncation(sums: StateSums, r: int) -> tuple[Tensor, Tensor]:
    """The r directions that carry the most.

    With P^1/2 Q^1/2 = U S V', B' is S_r^1/2 U_r' P^-1/2 B and C' is S_r^1/2 V_r' Q^-1/2 C.

    Returns:
        (G, r, N) float64 projections of B and of C.
    """
    p, q = (_powers(matrix) for matrix in (sums.states, sums.readouts))
    u, s, vh = torch.linalg.svd(p[0] @ q[0])
    scale = s[..., :r, None].sqrt()
    return scale * (u.mT[..., :r, :] @ p[1]), scale * (vh[..., :r, :] @ q[1])


def _powers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Root and inverse root of symmetric positive semidefinite matrices, of what is not numerically zero."""
    unit = near(matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True))  # (..., 1)
    values, vectors = torch.linalg.eigh(matrix / unit[..., None])
    values = values * unit
    there = values > RANK * values.amax(-1, keepdim=True).clamp(min=0)
    roots = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    both = (torch.where(there, powers, 0.0) for powers in (roots, 1 / roots))
    root, inverse = (vectors @ (powers[..., None] * vectors.mT) for powers in both)
    return root, inverse
