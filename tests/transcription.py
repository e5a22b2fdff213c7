"""Independent float64 transcriptions of the formulas in docs/methods.md, written as loops over full (L, D, N)
arrays.

Slow and memory-hungry on purpose: they share no code with the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Trace(NamedTuple):
    """Everything one mixer computes on one sample, float64 numpy."""

    u: np.ndarray  # (L, D)
    delta: np.ndarray  # (L, D)
    a: np.ndarray  # (L, D, N)
    before: np.ndarray  # (L, D, N) state before the update
    state: np.ndarray  # (L, D, N)
    B: np.ndarray  # (L, N)
    C: np.ndarray  # (L, N)
    gate: np.ndarray  # (L, D)
    y: np.ndarray  # (L, D) input of out_proj
    out: np.ndarray  # (L, d_model)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def trace(mixer: Any, x: np.ndarray) -> Trace:
    """x (L, d_model), already normalised."""
    channels, states = mixer.A_log.shape
    xz = x @ _array(mixer.in_proj.weight).T
    if mixer.in_proj.bias is not None:
        xz = xz + _array(mixer.in_proj.bias)
    length = len(x)
    conv_weight, conv_bias = _array(mixer.conv1d.weight)[:, 0], _array(mixer.conv1d.bias)
    u = np.zeros((length, channels))
    for t in range(length):
        for k in range(conv_weight.shape[1]):
            source = t - (conv_weight.shape[1] - 1) + k
            if source >= 0:
                u[t] += conv_weight[:, k] * xz[source, :channels]
    u = _silu(u + conv_bias)
    rank = mixer.time_step_rank
    projected = u @ _array(mixer.x_proj.weight).T
    step, B, C = projected[:, :rank], projected[:, rank : rank + states], projected[:, rank + states :]
    delta = np.log1p(np.exp(step @ _array(mixer.dt_proj.weight).T + _array(mixer.dt_proj.bias)))
    A = -np.exp(_array(mixer.A_log))
    a = np.exp(delta[:, :, None] * A[None])
    before, state = np.zeros_like(a), np.zeros_like(a)
    h = np.zeros((channels, states))
    for t in range(length):
        before[t] = h
        h = a[t] * h + (delta[t] * u[t])[:, None] * B[t][None]
        state[t] = h
    gate = _silu(xz[:, channels:])
    y = ((state * C[:, None]).sum(-1) + _array(mixer.D) * u) * gate
    out = y @ _array(mixer.out_proj.weight).T
    if mixer.out_proj.bias is not None:
        out = out + _array(mixer.out_proj.bias)
    return Trace(u, delta, a, before, state, B, C, gate, y, out)


def normalise(norm: Any, hidden: np.ndarray) -> np.ndarray:
    """RMSNorm of (L, d_model)."""
    scale = 1 / np.sqrt((hidden**2).mean(-1, keepdims=True) + norm.variance_epsilon)
    return _array(norm.weight) * hidden * scale


def remove_smallest(score: np.ndarray, count: int) -> np.ndarray:
    """Keep-mask without the `count` smallest; ties lose the lower index first."""
    keep = np.ones(score.size, dtype=bool)
    keep[np.argsort(score.ravel(), kind="stable")[:count]] = False
    return keep.reshape(score.shape)


def vote_mask(a_log: np.ndarray, traces: list[Trace], count: int) -> np.ndarray:
    """SparseSSM v1, Theorem 1 + Algorithm 1: vote at every step on A_log^2 sum_b h_{t-1}^2."""
    votes = np.zeros(a_log.shape)
    for t in range(len(traces[0].u)):
        score = a_log**2 * sum(one.before[t] ** 2 for one in traces)
        votes += ~remove_smallest(score, count)
    return remove_smallest(-votes, count)


def weighted_score(traces: list[Trace], power: float = 1.0) -> np.ndarray:
    """SparseSSM v2: sum_t w_t (mean_b a_t)^2 sum_b h_{t-1}^2, w_t = 1 / (t+1)^power."""
    total = np.zeros(traces[0].a.shape[1:])
    for t in range(len(traces[0].u)):
        decay = sum(one.a[t] for one in traces) / len(traces)
        total += (t + 1) ** -power * decay**2 * sum(one.before[t] ** 2 for one in traces)
    return total


def errors(mixer: Any, one: Trace, removed: str) -> np.ndarray:
    """e_t[d, n] (L, D, N) of `exact`, with the factor of the output projection."""
    omega = (_array(mixer.out_proj.weight) ** 2).sum(0)  # (D,)
    entering = (one.delta * one.u)[:, :, None] * one.B[:, None, :]
    other = np.zeros_like(one.state)
    if removed == "memoryless":
        other = entering
    else:
        h = np.zeros(one.state.shape[1:])
        for t in range(len(other)):
            h = np.exp(-one.delta[t])[:, None] * h + entering[t]
            other[t] = h
    return np.sqrt(omega)[None, :, None] * one.gate[:, :, None] * one.C[:, None, :] * (one.state - other)
