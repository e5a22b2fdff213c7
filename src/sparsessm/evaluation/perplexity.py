"""Perplexity: how well a model, dense or pruned, predicts a text. Used after pruning, never by it.

The protocol is the field's: consecutive non-overlapping windows (`data.evaluation_windows`), each from an
empty state, mean negative log-likelihood over all tokens but the first of each window, perplexity its
exponential. Because token perplexity depends on the tokenizer, bits per byte stand beside it.

Intervals are percentile bootstraps over windows. They are too narrow for few windows: those called 95 % hold
the true mean in 80 % of cases with 4 windows, in 87 % with 8, in about 95 % from 16 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.architectures import Architecture, adapt
from sparsessm.calibration.loss import losses
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import grouped
from sparsessm.data.edition import edition
from sparsessm.data.texts import fingerprint
from sparsessm.report.html import html_table
from sparsessm.report.record import finite, perplexity_table

BATCH = 2048  # tokens that go through the model together: several short windows, or one long one
RESAMPLES = 4000
DRAWN = 2**20  # window numbers drawn at a time: 16 MB, however many windows there are
RESAMPLE_SEED = 0  # fixed, so that the same windows always give the same interval


@dataclass(frozen=True)
class Perplexity:
    """What was measured on one text.

    Attributes:
        data: the name of the text, as given.
        tokens: predicted tokens, windows x (length - 1).
        windows: number of windows.
        length: tokens in a window.
        nll: mean negative log-likelihood, nats per predicted token.
        perplexity: exp(nll); infinite for a ruined model (nll above 709).
        low, high: 95 % bootstrap interval of the perplexity over windows; NaN for a single window, too narrow
            for fewer than 16.
        bits_per_byte: total negative log-likelihood in bits over the bytes of the predicted text.
        window_nll: mean negative log-likelihood of each window, in nats per token.
        fingerprint: SHA-256 of the windows' tokens.
        compute: the precision of products, "float32" or "bfloat16".
    """

    data: str
    tokens: int
    windows: int
    length: int
    nll: float
    perplexity: float
    low: float
    high: float
    bits_per_byte: float
    window_nll: tuple[float, ...] = field(repr=False)
    fingerprint: str = field(default="", repr=False)
    compute: str = field(default="float32", repr=False)

    @classmethod
    def restored(cls, fields: Mapping[str, Any]) -> Perplexity:
        """Of its fields as plain values."""
        return cls(**{**fields, "window_nll": tuple(fields["window_nll"])})

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        columns, cells = perplexity_table({self.data: self.record()}, {})
        title = f"{self.windows} windows of {self.length} tokens"
        return html_table(title, ["text", *columns[1:3]], [line[:3] for line in cells])

    def record(self) -> dict[str, Any]:
        """Returns the fields as JSON values (a number that is not finite is null), and as "text" the
        `edition` of a text that is not the same on every machine."""
        text = edition(self.data, "evaluation")
        return finite(asdict(self) | ({"text": text} if text else {}))


@dataclass(frozen=True)
class Difference:
    """The relative change of perplexity from one model to another on the same windows; 0.1 is 10 % worse.

    Attributes:
        mean: pruned / dense - 1.
        low, high: its 95 % paired bootstrap interval over windows; NaN for a single window, too narrow for
            fewer than 16.
    """

    mean: float
    low: float
    high: float


def perplexity(
    model: nn.Module,
    windows: Tensor,
    n_bytes: int,
    *,
    data: str = "",
    compute: str = "float32",
    progress: Progress | None = None,
) -> Perplexity:
    """Measures a transformers model that `architectures.adapt` knows.

    Args, Raises: as `measure`, and as `adapt`.
    """
    return measure(adapt(model, compute=compute), windows, n_bytes, data=data, progress=progress)


@torch.inference_mode()
def measure(
    architecture: Architecture,
    windows: Tensor,
    n_bytes: int,
    *,
    data: str = "",
    progress: Progress | None = None,
) -> Perplexity:
    """Measures a model on windows of tokens through the fast forward of its architecture.

    Args:
        architecture: from `adapt(model)`; the model as it is now.
        windows: (W, length) int64, length at least 2.
        n_bytes: UTF-8 bytes of the text of all predicted tokens, for the bits per byte.
        data: the text's name, for the record.
        progress: called with ("evaluate", windows done, windows, block).

    Raises:
        ValueError: windows of another shape or type, `n_bytes` below 1, a token outside the model's
            vocabulary, a window on which the model's likelihood is not finite.
    """
    refuse_windows(architecture, windows, n_bytes)
    batches, ranks = grouped(windows, BATCH), architecture.ranks
    mine = [batches[number] for number in ranks.mine(len(batches))]
    steps = Steps("evaluate", sum(map(len, mine)), progress, len(architecture.blocks))
    config: Any = architecture.model.config
    wide = 4 * batches[0].numel() * config.hidden_size
    width = architecture.residence.at_once(wide, len(batches), free=1)
    found: list[float] = []
    for first in range(0, len(mine), width):
        some = mine[first : first + width]
        found += losses(architecture, *some, steps=steps).tolist()
        steps(sum(map(len, some)))
    nlls = [nll for part in ranks.gathered(found) for nll in part]
    for number, nll in enumerate(nlls):
        if not math.isfinite(nll):
            raise ValueError(f"perplexity: the likelihood of window {number} is not finite ({nll})")
    return of_windows(nlls, windows, n_bytes, data=data, compute=architecture.compute.used)


def of_windows(nlls: list[float], windows: Tensor, n_bytes: int, *, data: str, compute: str) -> Perplexity:
    """What the mean negative log-likelihoods of windows, nats a token, come to.

    Args:
        nlls: one of each window. compute: the precision of products. Others: as `measure`.
    """
    count, length = windows.shape
    nll = math.fsum(nlls) / count
    tokens = count * (length - 1)
    low, high = interval(nlls)
    return Perplexity(
        data=data,
        tokens=tokens,
        windows=count,
        length=length,
        nll=nll,
        perplexity=_exp(nll),
        low=_exp(low),
        high=_exp(high),
        bits_per_byte=nll * tokens / math.log(2) / n_bytes,
        window_nll=tuple(nlls),
        fingerprint=fingerprint(windows),
        compute=compute,
    )


def refuse_windows(architecture: Architecture, windows: Tensor, n_bytes: int) -> None:
    """Refuse what a model cannot be measured on; arguments as of `measure`.

    Raises:
        ValueError: windows of another shape or type, `n_bytes` below 1, a token outside the vocabulary.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            "perplexity needs int64 windows of shape (at least 1, at least 2), "
            f"got {windows.dtype} {tuple(windows.shape)}"
        )
    if n_bytes < 1:
        raise ValueError(f"perplexity needs n_bytes >= 1, got {n_bytes}")
    config: Any = architecture.model.config
    if int(windows.min()) < 0 or int(windows.max()) >= config.vocab_size:
        raise ValueError(
            f"perplexity: tokens {int(windows.min())}..{int(windows.max())} do not fit the model's "
            f"vocabulary of {config.vocab_size}"
        )


def difference(dense: Perplexity, pruned: Perplexity) -> Difference:
    """Compares two models window by window, so that the windows' own difficulty cancels.

    Raises:
        ValueError: the two were measured on different windows.
    """
    if dense.fingerprint != pruned.fingerprint or dense.length != pruned.length:
        raise ValueError(
            f"difference needs the same windows: got {dense.windows} x {dense.length} of {dense.data!r} "
            f"({dense.fingerprint[:12]}) and {pruned.windows} x {pruned.length} of {pruned.data!r} "
            f"({pruned.fingerprint[:12]})"
        )
    changes = [after - before for before, after in zip(dense.window_nll, pruned.window_nll, strict=True)]
    low, high = interval(changes)
    mean = math.fsum(changes) / len(changes)
    return Difference(mean=_exp(mean) - 1, low=_exp(low) - 1, high=_exp(high) - 1)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a ruined model's perplexity does not fit a float; that is no reason to stop
        return math.inf


def interval(values: list[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of the values, one a window; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    sample = torch.tensor(values, dtype=torch.float64)
    random = torch.Generator().manual_seed(RESAMPLE_SEED)
    rows = max(1, DRAWN // len(values))
    means = [
        sample[
            torch.randint(len(values), (min(rows, RESAMPLES - start), len(values)), generator=random)
        ].mean(1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
