"""Muon (Keller Jordan, 2024), shared between the processes that train a built-in model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

WEIGHT_DECAY = 0.05


class Muon:
    """Momentum whose matrix update is made orthogonal by five Newton-Schulz steps (Keller Jordan, 2024)."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    def step(self, rate: float, momentum: float = 0.95) -> None:
        for shape, group in self.groups.items():
            grad = torch.stack([matrix.grad for matrix in group])
            state = self.momenta[shape].lerp_(grad, 1 - momentum)
            wanted = grad.lerp(state, momentum)
            rank, ranks = dist.get_rank(), dist.get_world_size()
            update = torch.zeros_like(wanted)
            update[rank::ranks] = orthogonal(wanted[rank::ranks])  # each process makes its part
            dist.all_reduce(update)
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, direction in zip(group, update, strict=True):
                matrix.data.mul_(1 - rate * WEIGHT_DECAY).sub_(scale * direction)


def orthogonal(x: Tensor) -> Tensor:
    """Pushes the singular values of (K, rows, columns) towards one."""
    wide = x if x.shape[1] <= x.shape[2] else x.transpose(1, 2)
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for _ in range(5):
        gram = wide @ wide.transpose(1, 2)
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return (wide if x.shape[1] <= x.shape[2] else wide.transpose(1, 2)).float()
