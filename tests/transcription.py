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


def steps_of_mamba1(mixer: Any, hidden: torch.Tensor, norm: Any) -> list[tuple[np.ndarray, ...]]:
    """Of each window: h (L, D, N), C (L, 1, N) and gain (L, D), by the transcription."""
    found = []
    for window in hidden.numpy():
        one = trace(mixer, normalise(norm, window))
        found.append((one.state, one.C[:, None], one.gate))
    return found


def steps_of_mamba2(mixer: Any, hidden: torch.Tensor, norm: Any) -> list[tuple[np.ndarray, ...]]:
    """The same of Mamba-2, C (L, G, N), by the plain recurrence; the gain has the norm in it."""
    H, P, G, N = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    D, GN = H * P, G * N
    w = {name: _array(parameter) for name, parameter in mixer.named_parameters()}
    found = []
    for window in hidden.numpy():
        projected = normalise(norm, window) @ w["in_proj.weight"].T
        length = len(projected)
        z, mixed, step = projected[:, :D], projected[:, D : 2 * D + 2 * GN], projected[:, 2 * D + 2 * GN :]
        taps = w["conv1d.weight"][:, 0]
        past = np.concatenate([np.zeros((taps.shape[1] - 1, mixed.shape[1])), mixed])
        conv = np.stack([(past[t : t + taps.shape[1]].T * taps).sum(1) for t in range(length)])
        conv = _silu(conv + w["conv1d.bias"])
        u, B, C = conv[:, :D].reshape(-1, H, P), conv[:, D : D + GN], conv[:, D + GN :]
        B, C = B.reshape(-1, G, N), C.reshape(-1, G, N)
        delta = np.log1p(np.exp(step + w["dt_bias"]))
        h, states, gains = np.zeros((H, P, N)), [], []
        for t in range(length):
            y = np.zeros((H, P))
            for head in range(H):
                group = head // (H // G)
                decay = np.exp(-delta[t, head] * np.exp(w["A_log"][head]))
                h[head] = decay * h[head] + delta[t, head] * np.outer(u[t, head], B[t, group])
                y[head] = h[head] @ C[t, group] + w["D"][head] * u[t, head]
            gate = _silu(z[t])
            seen = (y.reshape(-1) * gate).reshape(G, -1)
            scale = 1 / np.sqrt((seen**2).mean(1) + mixer.norm.variance_epsilon)
            gains.append(np.repeat(scale, D // G) * gate * w["norm.weight"])
            states.append(h.reshape(D, N).copy())
        found.append((np.stack(states), C, np.stack(gains)))
    return found


def column_votes(a_log: np.ndarray, energies: np.ndarray, count: int) -> np.ndarray:
    """SparseSSM's vote on whole states (its code, prune/structure_ts.py): at every step each of the `count`
    states of the smallest sum_d A_log^2 S_t gets a vote; energies (L, D, N) are S_t, before the step.

    Among equals the lower number gets it; their topk leaves that open.
    """
    votes = np.zeros(a_log.shape[1])
    for energy in energies:
        importance = np.zeros(a_log.shape[1])
        for n in range(a_log.shape[1]):
            importance[n] = sum(a_log[:, n] ** 2 * energy[:, n])
        votes += ~remove_smallest(importance, count)
    return votes


def ghost_saliency(windows: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """(G, N), GHOST (arXiv 2602.11408): the root of the mean over windows, steps and channels of a group of
    h_t^2 C_t^2, the state after the step; `windows` as `steps_of_mamba1` and `steps_of_mamba2` give them."""
    groups = windows[0][1].shape[1]
    total, count = np.zeros(windows[0][1].shape[1:]), 0
    for h, C, _ in windows:
        for t in range(len(h)):
            for group, own in enumerate(np.split(h[t], groups)):
                total[group] += (own**2).sum(0) * C[t, group] ** 2
        count += h.shape[0] * h.shape[1] // groups
    return np.sqrt(total / count)


def block_influence(before: np.ndarray, after: np.ndarray) -> float:
    """ShortGPT (arXiv 2403.03853): 1 - mean cosine of what a block reads and hands on, (tokens, d)."""
    cosines = [(x @ y) / np.sqrt((x @ x) * (y @ y)) for x, y in zip(before, after, strict=True)]
    return 1 - sum(cosines) / len(cosines)
