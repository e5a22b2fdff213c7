"""Weights and correlated inputs of one linear layer, and the Hessian of its output error, in NumPy."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
NM = [(1, 4), (2, 4), (3, 4), (4, 8), (6, 8)]


def inputs(seed: int, columns: int) -> np.ndarray:
    """Correlated inputs (columns, tokens) on very different scales."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns, columns)) @ rng.standard_normal((columns, 3 * columns))
    return np.exp(rng.standard_normal((columns, 1))) * mixed


def problem(seed: int, rows: int = 4, columns: int = 8) -> tuple[np.ndarray, np.ndarray]:
    X = inputs(seed, columns)
    return np.random.default_rng(seed + 1).standard_normal((rows, columns)), 2 * X @ X.T


def random_keep(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed + 2).random(shape) < 0.5
