"""What compression cost, token by token: losses of both models, the KL divergence, the windows that suffered.

Place in the flow: beside perplexity.py, whose figures come of the same pass; `beside_dense.py` asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture
from sparsessm.calibration.loss import nats, predictions
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import grouped
from sparsessm.calibration.walk import final
from sparsessm.data.texts import Tokenizer
from sparsessm.evaluation.perplexity import BATCH, difference, interval, of_windows, refuse_windows

EDGES = (0.0, *(10 ** (power / 2) for power in range(-10, 4)), math.inf)  # of the histogram, nats
SHOWN = 5  # windows, and tokens of each
STRETCH = 96  # tokens of a window that are shown
Words = Callable[[list[int]], str]  # tokens -> their text


@dataclass(frozen=True)
class Compared:
    """Two models on the same windows, by predicted token: (W, L - 1) each.

    Attributes:
        before, after: negative log-likelihood under the dense model and under the other, nats, float64.
        kl: KL(dense || other) of the next token, nats, float64, at least 0.
        same: whether both find the same token the likeliest.
        compute: the precision of products of either model.
    """

    before: Tensor
    after: Tensor
    kl: Tensor
    same: Tensor
    compute: tuple[str, str]


@torch.inference_mode()
def compare(
    dense: Architecture, other: Architecture, windows: Tensor, *, progress: Progress | None = None
) -> Compared:
    """Run both models over windows of tokens.

    Args:
        dense, other: from `adapt(model)`. windows: (W, L) int64, L at least 2.
        progress: called with ("compare", windows done of both models, twice the windows, block).

    Raises:
        ValueError: as `perplexity.refuse_windows`; vocabularies of two sizes; a likelihood that is
            not finite.
    """
    for architecture in (dense, other):
        refuse_windows(architecture, windows, 1)
    steps = Steps("compare", 2 * len(windows), progress)
    parts: list[list[Tensor]] = [[], [], [], []]
    batches = grouped(windows, BATCH)
    wide = 4 * batches[0].numel() * max(_width(dense), _width(other))
    width = min(one.residence.at_once(wide, len(batches), free=1) for one in (dense, other))
    for first in range(0, len(batches), width):
        some = batches[first : first + width]
        states = [final(dense, *some)]
        steps(sum(map(len, some)))
        states.append(final(other, *some))
        steps(sum(map(len, some)))
        with dense.tail.computing(dense.compute.used), other.tail.computing(other.compute.used):
            for tokens, *hidden in zip(some, *states, strict=True):
                both = zip(*(predictions(state, tokens) for state in hidden), strict=True)
                for (mine, right), (its, _) in both:
                    found = _rows(dense.head(mine[None])[0], other.head(its[None])[0], right)
                    for part, value in zip(parts, found, strict=True):
                        part.append(value)
    before, after, kl, same = (torch.cat(part).view(len(windows), -1) for part in parts)
    for name, losses in (("dense", before), ("compressed", after)):
        if not torch.isfinite(losses).all():
            raise ValueError(f"the likelihood of a token under the {name} model is not finite")
    return Compared(before, after, kl, same, (dense.compute.used, other.compute.used))


def _width(architecture: Architecture) -> int:
    config: Any = architecture.model.config
    return int(config.hidden_size)


def _rows(before: Tensor, after: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """Losses of both, KL and agreement of logits (rows, vocabulary)."""
    if before.shape != after.shape:
        raise ValueError(
            f"the models have vocabularies of {before.shape[1]:,} and {after.shape[1]:,} tokens; to compare "
            "them, both must have the same"
        )
    expected, found = (F.log_softmax(logits.double(), -1) for logits in (before, after))
    kl = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).clamp(min=0)
    same = before.max(-1).indices == after.max(-1).indices
    return nats(before, right).double(), nats(after, right).double(), kl, same


def perplexities(found: Compared, windows: Tensor, n_bytes: int, data: str) -> dict[str, Any]:
    """Both perplexities and their paired difference, as a record says them.

    Args:
        windows: (W, L), those of `found`. n_bytes: of the text of all predicted tokens. data: its name.
    """
    dense, pruned = (
        of_windows(losses.mean(1).tolist(), windows, n_bytes, data=data, compute=compute)
        for losses, compute in zip((found.before, found.after), found.compute, strict=True)
    )
    change = asdict(difference(dense, pruned))
    return {"dense": dense.record(), "pruned": pruned.record(), "difference": change}


def histogram(found: Compared) -> dict[str, Any]:
    """`Measured.divergence`: the KL over tokens, with a 95 % interval of its mean over windows."""
    kl = found.kl.flatten()
    low, high = interval(found.kl.mean(1).tolist())
    edges = torch.tensor(EDGES[1:-1], dtype=kl.dtype)
    counts = torch.bincount(torch.bucketize(kl, edges, right=True), minlength=len(EDGES) - 1)
    rank = kl.sort().values  # torch.quantile takes at most 2**24 values
    return {
        "mean": float(kl.mean()),
        "low": low,
        "high": high,
        "median": float(rank[(len(rank) - 1) // 2]),
        "p99": float(rank[math.ceil(0.99 * len(rank)) - 1]),
        "most": float(rank[-1]),
        "same": float(found.same.double().mean()),
        "tokens": len(rank),
        "edges": list(EDGES[:-1]),
        "counts": counts.tolist(),
    }


def worst(found: Compared, windows: Tensor, decode: Words) -> list[dict[str, Any]]:
    """`Measured.windows`: where a token lost most on average, the worst window first.

    Args:
        windows: (W, L), those of `found`. decode: the text of tokens.
    """
    lost = found.after - found.before
    means = lost.mean(1)
    told = []
    for index in means.argsort(descending=True)[:SHOWN].tolist():
        if means[index] <= 0:
            break
        start, length = _stretch(lost[index])
        texts = pieces(windows[index, : start + length + 1].tolist()[-length - 1 :], decode)[1:]
        of_it = lost[index, start : start + length].tolist()
        most = lost[index].argsort(descending=True)[:SHOWN].tolist()
        told.append(
            {
                "index": index,
                "lost": float(means[index]),
                "before": float(found.before[index].mean()),
                "after": float(found.after[index].mean()),
                "start": start + 1,
                "tokens": [[text, loss] for text, loss in zip(texts, of_it, strict=True)],
                "worst": [
                    [
                        pieces(windows[index, : place + 2].tolist()[-2:], decode)[1],
                        float(found.before[index, place]),
                        float(found.after[index, place]),
                    ]
                    for place in most
                ],
            }
        )
    return told


def _stretch(lost: Tensor) -> tuple[int, int]:
    """First place and length of the stretch that lost most in all."""
    length = min(STRETCH, len(lost))
    sums = lost.unfold(0, length, 1).sum(1)
    return int(sums.argmax()), length


def pieces(tokens: list[int], decode: Words) -> list[str]:
    """The text that each token adds to those before it; a character of several tokens is the last one's."""
    texts, whole = [], ""
    for end in range(1, len(tokens) + 1):
        now = decode(tokens[:end])
        if now.endswith("\ufffd") and end < len(tokens):
            now = whole  # half a character
        texts.append(now[len(whole) :] if now.startswith(whole) else now)
        whole = now
    return texts


def text_of(tokenizer: Tokenizer) -> Words:
    """What `pieces` asks for, of a transformers tokenizer."""
    words: Any = tokenizer
    return lambda tokens: words.decode(tokens, clean_up_tokenization_spaces=False)
