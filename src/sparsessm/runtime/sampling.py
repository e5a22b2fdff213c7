"""Choosing the next token: greedy, temperature, top-k, top-p, as pure functions of logits and a generator.

Place in the flow: between `Engine.step` and the next one, in `generation.py`. The filters are applied in this
order, as in transformers: temperature, the k most probable, the fewest of those that reach p. Ties go to the
smaller token id, so that a choice never depends on how something was sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST = 1024  # candidates looked at before all of them are sorted, to reach top_p


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: only so many of the most probable tokens; None: all.
        top_p: only the fewest most probable tokens whose probabilities sum to at least this; None: all. With
            `top_k` too, probabilities are those among the k.

    Raises:
        ValueError: a value that is not allowed, or a filter that greedy choice would ignore.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature!r}; allowed: 0 (greedy) or a finite number above 0"
            )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; allowed: a whole number from 1, or none")
        if self.top_p is not None and (not _number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; allowed: 0 < top_p <= 1, or none")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if self.temperature == 0 and value is not None:
                raise ValueError(
                    f"{name} has no effect at temperature 0 (greedy); give a temperature above 0"
                )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose(
    logits: Tensor, sampling: Sampling, generators: torch.Generator | Sequence[torch.Generator] = ()
) -> Tensor:
    """Choose one token for each row of logits.

    Args:
        logits: float32 (V,) or (B, V); -inf is a token that cannot be.
        sampling: how.
        generators: one on the CPU for each row, or the one of a single row; each is advanced by one draw.
            Not used if the temperature is 0.

    Returns:
        int64, () or (B,).

    Raises:
        ValueError: logits that are NaN, or whose largest is not finite; too few generators.
    """
    rows = logits if logits.dim() == 2 else logits[None]
    if sampling.temperature == 0:
        ids = _largest(rows)
    else:
        own = [generators] if isinstance(generators, torch.Generator) else generators
        if len(own) != len(rows):
            raise ValueError(f"{len(own)} generators for {len(rows)} sequences; one each is needed")
        drawn = [_draw(*candidates(row, sampling), one) for row, one in zip(rows, own, strict=True)]
        ids = torch.tensor(drawn, dtype=torch.int64)
    return ids if logits.dim() == 2 else ids[0]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The distribution that a token is drawn from.

    Args:
        logits: (V,).
        sampling: how; at temperature 0 all probability is the most probable token's.

    Returns:
        Token ids int64 (n,) and their probabilities float64 (n,), which sum to 1. Ordered by falling
        probability where a filter is set, else by id.

    Raises:
        ValueError: logits that are NaN, or whose largest is not finite.
    """
    _refuse_not_finite(logits)
    if sampling.temperature == 0:
        return logits.argmax()[None], torch.ones(1, dtype=torch.float64)
    size = len(logits)
    top_k = min(sampling.top_k or size, size)
    top_p = sampling.top_p or 1.0
    if top_k < size:
        ids = _best(logits, top_k)
        weights = _weights(logits[ids], sampling.temperature)
        total = weights.sum()
    elif top_p < 1:
        every = _weights(logits, sampling.temperature)
        total = every.sum()
        ids = _best(logits, min(_FIRST, size))
        if every[ids].sum() < top_p * total:
            ids = _best(logits, size)
        weights = every[ids]
    else:
        weights = _weights(logits, sampling.temperature)
        ids, total = torch.arange(size), weights.sum()
    if top_p < 1:
        # the first position at which the sum reaches p; rounding must not lose the last candidate
        reached = torch.searchsorted(weights.cumsum(0), top_p * total)
        kept = min(int(reached) + 1, len(ids))
        ids, weights = ids[:kept], weights[:kept]
    return ids, weights / weights.sum()


def _largest(rows: Tensor) -> Tensor:
    """(B, V) -> (B,), the first of the largest of each row. numpy's search takes a tenth of torch's time."""
    if not rows.shape[-1]:
        _refuse_not_finite(rows)
    ids = torch.from_numpy(rows.numpy().argmax(-1))
    _refuse_not_finite(rows.gather(-1, ids[:, None]))  # where one of them is NaN it was found
    return ids


def _refuse_not_finite(logits: Tensor) -> None:
    # the greatest of several numbers is NaN if one of them is
    if not logits.shape[-1] or not all(map(math.isfinite, logits.amax(-1, keepdim=True).flatten().tolist())):
        raise ValueError("the logits are NaN or infinite: the model or its state is damaged")


def _weights(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities up to a factor, float64; the largest logit, which must be among them, gets 1."""
    # subtracted first: a temperature near 0 then gives exp(-inf) = 0, never inf - inf
    return torch.exp((logits.double() - logits.max().double()) / temperature)


def _best(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits, by falling logit, ties by rising id."""
    if count < len(logits):
        values, ids = logits.topk(count)
        last = values[-1]
        if int((logits >= last).sum()) > count:  # torch.topk takes any of the tied ones
            above = ids[values > last]
            ids = torch.cat([above, (logits == last).nonzero()[: count - len(above), 0]])
        ids = ids.sort().values
    else:
        ids = torch.arange(len(logits))
    return ids[logits[ids].sort(descending=True, stable=True).indices]


def _draw(ids: Tensor, probabilities: Tensor, generator: torch.Generator) -> int:
    """One of the ids, by one uniform number of the generator."""
    sums = probabilities.cumsum(0)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1]
    # The first sum above the number: a token of probability 0 adds nothing, so it is never the first. Where
    # rounding brings the number up to the total, the last token that added something.
    place = int(torch.searchsorted(sums, drawn, right=True))
    if place == len(ids):
        place = int(torch.searchsorted(sums, sums[-1]))
    return int(ids[place])
