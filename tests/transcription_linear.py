"""Independent float64 transcriptions of the papers on linear layers: what is removed, how the rest is
repaired, and how the sparsity is shared out between layers.

Slow loops on purpose: they share no code with the package. Wanda arXiv 2306.11695, SparseGPT 2301.00774, its
factor from GPTQ 2210.17323, OWL 2310.05175, the optimal brain surgeon (OBS) of Hassibi & Stork 1993.

W is (outputs, inputs), X (inputs, tokens), H = 2 X X' (inputs, inputs) without damping. Masks: True = kept.
Every count is Python's round(), halves to even; among equal scores the lower flat index is removed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Array = np.ndarray


def _float(array: Array) -> Array:
    return np.array(array, dtype=np.float64)  # a copy, always


def _without_smallest(scores: Iterable[float], count: int) -> list[bool]:
    scores = [float(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    removed = set(order[:count])
    return [index not in removed for index in range(len(scores))]


def _keep_in_groups(scores: Array, n_kept: int, m: int) -> Array:
    """n_kept of every m consecutive inputs of a row. (`prune_n` in the public code counts the removed.)"""
    rows, columns = scores.shape
    assert columns % m == 0, f"{columns} inputs are no multiple of {m}"
    keep = np.zeros(scores.shape, dtype=bool)
    for i in range(rows):
        for j in range(0, columns, m):
            keep[i, j : j + m] = _without_smallest(scores[i, j : j + m], m - n_kept)
    return keep


def magnitude_mask(W: Array, sparsity: float) -> Array:
    """The smallest |w| of the whole matrix go."""
    W = _float(W)
    return np.array(_without_smallest(np.abs(W).flatten(), round(sparsity * W.size))).reshape(W.shape)


def magnitude_nm(W: Array, n_kept: int, m: int) -> Array:
    return _keep_in_groups(np.abs(_float(W)), n_kept, m)


def wanda_score(W: Array, X: Array) -> Array:
    """|W_ij| ||X_j||_2 over all tokens of all samples."""
    W, X = _float(W), _float(X)
    rows, columns = W.shape
    assert X.shape[0] == columns, "X is (inputs, tokens)"
    score = np.zeros(W.shape)
    for j in range(columns):
        norm = sum(x * x for x in X[j]) ** 0.5
        for i in range(rows):
            score[i, j] = abs(W[i, j]) * norm
    return score


def wanda_mask(W: Array, X: Array, sparsity: float) -> Array:
    """The same number in every output row. Wanda's code rounds it down; we round to the nearest."""
    score = wanda_score(W, X)
    return np.array([_without_smallest(row, round(sparsity * len(row))) for row in score])


def wanda_nm(W: Array, X: Array, n_kept: int, m: int) -> Array:
    return _keep_in_groups(wanda_score(W, X), n_kept, m)


def damped(H: Array, damp: float = 0.01) -> tuple[Array, Array]:
    """(H + lambda I, which inputs are dead). A dead input, 0 on every token, gets H_jj = 1 first, and that 1
    counts in lambda = damp * mean diag(H)."""
    H = _float(H)
    dead = np.array([H[j, j] == 0 for j in range(len(H))])
    for j in np.flatnonzero(dead):
        H[j, j] = 1
    amount = damp * sum(H[j, j] for j in range(len(H))) / len(H)
    for j in range(len(H)):
        H[j, j] += amount
    return H, dead


def factor(H: Array, damp: float = 0.01) -> Array:
    """U, upper triangular, with U'U = (H + lambda I)^-1. U_jj U[j, j:] is the first row of the inverse of the
    damped H[j:, j:], the inverse that OBS needs once the columns left of j are settled (GPTQ)."""
    return np.linalg.cholesky(np.linalg.inv(damped(H, damp)[0])).T


# What is kept in columns [first, last), asked whenever the sweep is at column `first`; None: decided before.
Choice = Callable[[int, Array, Array], "tuple[int, Array] | None"]


def _sweep(W: Array, H: Array, blocksize: int, damp: float, choose: Choice) -> tuple[Array, Array]:
    """Algorithm 1 of SparseGPT. choose(column, current W, U) -> (last column + 1, keep of those columns)."""
    W, U = _float(W), factor(H, damp)
    rows, columns = W.shape
    W[:, damped(H, damp)[1]] = 0
    keep = np.ones(W.shape, dtype=bool)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        errors = np.zeros((rows, end - start))
        for j in range(start, end):
            chosen = choose(j, W, U)
            if chosen is not None:
                # from weights that hold every push so far; past `end` this block's are still owed
                assert chosen[0] <= end, "a mask reaches into a block whose weights are not up to date"
                keep[:, j : chosen[0]] = chosen[1]
            for i in range(rows):
                if keep[i, j]:
                    continue
                error = W[i, j] / U[j, j]
                for k in range(j, end):
                    W[i, k] -= error * U[j, k]
                W[i, j] = 0
                errors[i, j - start] = error
        for i in range(rows):
            for j in range(start, end):
                W[i, end:] -= errors[i, j - start] * U[j, end:]
    return W, keep


def sparsegpt(
    W: Array, H: Array, sparsity: float, blocksize: int = 128, damp: float = 0.01
) -> tuple[Array, Array]:
    """(W_new, keep). In each block exactly round(sparsity * size of the block) go.

    The public code removes all scores <= the one at int(sparsity * size) of the sorted list, counted from 0:
    one more than asked, and more among ties (one weight a block even at sparsity 0). We do the exact count.
    """
    rows, columns = W.shape

    def choose(j: int, W: Array, U: Array) -> tuple[int, Array] | None:
        if j % blocksize:
            return None
        end = min(j + blocksize, columns)
        score = [W[i, k] ** 2 / U[k, k] ** 2 for i in range(rows) for k in range(j, end)]
        keep = _without_smallest(score, round(sparsity * (rows * (end - j))))
        return end, np.array(keep).reshape(rows, end - j)

    return _sweep(W, H, blocksize, damp, choose)


def sparsegpt_nm(
    W: Array, H: Array, n_kept: int, m: int, blocksize: int = 128, damp: float = 0.01
) -> tuple[Array, Array]:
    """(W_new, keep). A group is chosen when the sweep reaches it; the block size changes rounding only."""
    rows, columns = W.shape
    assert columns % m == 0, f"{columns} inputs are no multiple of {m}"
    assert blocksize % m == 0, f"a block of {blocksize} columns cuts a group of {m}"

    def choose(j: int, W: Array, U: Array) -> tuple[int, Array] | None:
        if j % m:
            return None
        score = np.array([[W[i, k] ** 2 / U[k, k] ** 2 for k in range(j, j + m)] for i in range(rows)])
        return j + m, _keep_in_groups(score, n_kept, m)

    return _sweep(W, H, blocksize, damp, choose)


def sparsegpt_fixed(W: Array, H: Array, keep: Array, blocksize: int = 128, damp: float = 0.01) -> Array:
    """The repair alone, for a mask from elsewhere (SparseGPT, section 3.2)."""
    return _sweep(W, H, blocksize, damp, lambda j, W, U: (j + 1, keep[:, j : j + 1]))[0]


def output_error(before: Array, after: Array, H: Array) -> float:
    """1/2 tr(d H d'), d = before - after: with H = 2 X X' the squared output error ||d X||^2. `damped` H adds
    lambda/2 ||d||^2, and that sum is what the sweep keeps small."""
    difference, total = np.atleast_2d(_float(before) - _float(after)), 0.0
    for row in difference:
        for j in range(len(row)):
            for k in range(len(row)):
                total += row[j] * H[j, k] * row[k] / 2
    return total


def obs_brute(W_row: Array, H: Array, removed: Iterable[int]) -> tuple[Array, float]:
    """(w, 1/2 d H d'): the best row of all that are 0 on `removed`. Least squares on the support S:
    w_S = H_SS^-1 H_S: w. H is taken as it is: pass `damped(H)[0]` to compare with a sweep."""
    H, gone = _float(H), set(removed)
    support = [j for j in range(len(H)) if j not in gone]
    w = np.zeros(len(H))
    if support:
        w[support] = np.linalg.solve(H[np.ix_(support, support)], H[support] @ _float(W_row))
    return w, output_error(W_row, w, H)


def obs_greedy(W_row: Array, H: Array, count: int) -> tuple[Array, list[int], float]:
    """(w, removed in order, 1/2 d H d'): Hassibi's surgeon. Always remove the weight of the smallest
    w_q^2 / [H^-1]_qq, move all survivors, and invert the survivors' H anew."""
    w, H, removed = _float(W_row), _float(H), []
    for _ in range(count):
        alive = [j for j in range(len(w)) if j not in removed]
        inverse = np.linalg.inv(H[np.ix_(alive, alive)])
        saliency = [w[j] ** 2 / inverse[a, a] for a, j in enumerate(alive)]
        q = saliency.index(min(saliency))
        step = w[alive[q]] / inverse[q, q]
        for a, j in enumerate(alive):
            w[j] -= step * inverse[a, q]
        w[alive[q]] = 0
        removed.append(alive[q])
    return w, removed, output_error(W_row, w, H)


def dense_target(W: Array, XXdT: Array, H: Array, damp: float) -> Array:
    """W (X X~') (X~ X~' + lambda I)^-1, lambda = damp * mean diag: the ridge solution of min ||V X~ - W X||,
    with X the inputs in the dense model and X~ those in the pruned one. `XXdT` = X X~' and `H` = X~ X~' may
    carry the same factor (2 as in the Hessian). lambda is of H as given, a dead input's 0 included."""
    H = _float(H)
    amount = damp * sum(H[j, j] for j in range(len(H))) / len(H)
    return np.linalg.solve((H + amount * np.eye(len(H))).T, (_float(W) @ _float(XXdT)).T).T


def outlier_ratio(scores: Array, M: float) -> float:
    """D_l of OWL: the share of a layer's (Wanda) scores above M times their mean."""
    values = [float(score) for score in np.asarray(scores).flatten()]
    mean = sum(values) / len(values)
    return sum(value > M * mean for value in values) / len(values)


def owl_ratios(scores_per_layer: Sequence[Array], M: float, lam: float, p: float) -> Array:
    """Sparsity of each layer: S_l falls linearly in D_l over a range of 2 lam, and the plain mean is p.

    The paper asks for S_l in [p - lam, p + lam] and gives no closed formula; this is the one of its code
    (luuyin/OWL, prune_wanda_outlier): min-max scaling to [0, 2 lam], then a shift of the mean. With skewed
    D_l that shift takes one end beyond p +- lam. All D_l equal: 0/0 in that code, p here.
    """
    ratios = [outlier_ratio(scores, M) for scores in scores_per_layer]
    low, high = min(ratios), max(ratios)
    if low == high:
        return np.full(len(ratios), float(p))
    scaled = [(ratio - low) / (high - low) * 2 * lam for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    return np.array([1 - (value - mean + (1 - p)) for value in scaled])


def hessian_trace_ratios(
    diag_per_layer: Sequence[Array], columns_per_layer: Sequence[int], p: float, alpha: float
) -> Array:
    """Sparsity of each layer of ONE family (all in_proj, say). Sensitivity = sum diag(H)^2 / columns;
    by its rank, retention runs straight from 1-p-alpha (least) to 1-p+alpha (most). One layer alone gets p.

    Among equals the earlier layer is the less sensitive. SparseSSM's code has two half ramps instead, over
    n = min(24, layers // 2) layers each, both ending AT 1-p in the middle (4 layers: -a, 0, 0, +a).
    """
    sensitivity = []
    for diag, columns in zip(diag_per_layer, columns_per_layer, strict=True):
        sensitivity.append(sum(float(value) ** 2 for value in diag) / columns)
    count = len(sensitivity)
    if count == 1:
        return np.array([float(p)])
    order = sorted(range(count), key=lambda layer: (sensitivity[layer], layer))
    ratios = np.zeros(count)
    for rank, layer in enumerate(order):
        ratios[layer] = 1 - (1 - p - alpha + 2 * alpha * rank / (count - 1))
    return ratios


def conv1d_hessians(u: Array, width: int) -> Array:
    """(channels, width, width): 2 sum_t x_t x_t' of each channel of u (channels, tokens), one sequence.
    x_t = (u_{t-width+1} .. u_t), zeros before the start: tap i of a causal depthwise conv1d meets entry i."""
    u = _float(u)
    H = np.zeros((len(u), width, width))
    for c in range(len(u)):
        padded = [0.0] * (width - 1) + list(u[c])
        for t in range(u.shape[1]):
            for i in range(width):
                for j in range(width):
                    H[c, i, j] += 2 * padded[t + i] * padded[t + j]
    return H


def conv1d(
    weight: Array, hessians: Array, sparsity: float, blocksize: int = 128, damp: float = 0.01
) -> tuple[Array, Array]:
    """(weight, keep) of a depthwise conv1d, (channels, 1, k) or (channels, k): each channel is a matrix of
    one row with its own k x k Hessian, lambda and count round(sparsity * k)."""
    new, keep = _float(weight), np.ones(np.shape(weight), dtype=bool)
    for c in range(len(new)):
        row, kept = sparsegpt(new[c].reshape(1, -1), hessians[c], sparsity, blocksize, damp)
        new[c], keep[c] = row.reshape(new[c].shape), kept.reshape(new[c].shape)
    return new, keep
