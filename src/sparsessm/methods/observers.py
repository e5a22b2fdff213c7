"""Stage 1, running sums of what a target does to the calibration windows. All are bounded in memory: nothing
of size (L, D, N).

An observer is fed by the block's forward, slab by slab in the order of time, each slab holding all windows
(calibration/walk.py). `options` asks the kernel for its statistics; letters as in architectures/base.py,
formulas in docs/methods.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from sparsessm.kernels import ScanStats, products
from sparsessm.methods.hessian import near


@dataclass(frozen=True)
class ErrorSums:
    """What removing entries of A_log does to the layer's output, as a quadratic form per channel, in
    residual-stream units.

    error(mask) = sum_d 1_d' G_d 1_d exactly, with the layer's input fixed and W_out' W_out taken as diagonal.
    """

    gram: Tensor  # (D, N, N) float64, or its diagonal (D, N)
    cross: Tensor | None  # (D, N) float64: error against the input that D carries; None without a D
    power: Tensor | None  # (D,) float64: energy of that input
    signal: float  # energy of the layer's output in the same units


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear layer's inputs, means over the calibration tokens.

    Attributes:
        gram: (in, in) float64, mean x x'; (out, in, in) for a depthwise layer, whose rows see inputs of
            their own.
        cross: (in, in) float64, mean of x_dense x': the inputs in the dense model against those in the
            pruned one; None if not asked for.
        diagonal: only the diagonal was asked for: gram is (in,), or (out, in) for a depthwise layer.
        tokens: that were seen; None where it is not known. An expert may see none: gram is empty then.
        borrowed: share of them that is its layer's (borrowing.py).
    """

    gram: Tensor
    cross: Tensor | None = None
    diagonal: bool = False
    tokens: int | None = None
    borrowed: float = 0.0

    @property
    def power(self) -> Tensor:
        """(in,) or (out, in): mean x_j^2."""
        return self.gram if self.diagonal else self.gram.diagonal(dim1=-2, dim2=-1)

    def scaled(self, dtype: torch.dtype) -> tuple[Moments, float]:
        """The same in another dtype, divided by a power of four so that the mean power is near 1; and that
        number. No unit of the inputs is then too small or too large for the dtype, and nothing is rounded
        that the cast alone would not round."""
        unit = float(near(self.power.double().mean(-1).max())) if self.gram.numel() else 1.0

        def cast(sums: Tensor) -> Tensor:
            return torch.div(sums, unit, out=sums.new_empty(sums.shape, dtype=dtype))

        cross = None if self.cross is None else cast(self.cross)
        return Moments(cast(self.gram), cross, self.diagonal, self.tokens), unit

    def reordered(self, order: Tensor) -> Moments:
        """Of the inputs in another order; of inputs that all rows share."""
        cross = None if self.cross is None else self.cross[order][:, order]
        return Moments(self.gram[order][:, order], cross, self.diagonal, self.tokens)

    def through(self, weight: Tensor, dense: Tensor) -> Moments:
        """The moments of `weight @ x`, whose dense counterpart is `dense @ x_dense`; both (out, in)."""
        weight, dense = weight.double(), dense.double()
        cross = None if self.cross is None else dense @ self.cross @ weight.mT
        return Moments(weight @ self.gram @ weight.mT, cross)


def joined(seen: Moments | None, also: Tensor | None, width: int) -> Moments:
    """What was seen of a matrix of `width` inputs, None if it has none; its Hessian of another use added."""
    if seen is None:
        return Moments(torch.eye(width, dtype=torch.float64) if also is None else also)
    cross = None if seen.cross is None or also is None else seen.cross + also
    return seen if also is None else replace(seen, gram=seen.gram + also, cross=cross)


class Observer(ABC):
    """What is fed while the blocks run. A block sees it as a `Tap` (architectures/base.py).

    Attributes:
        options: what the kernel sums for it. paired: it sees the inputs in both models.
        routed: it is told which of the slab's tokens an expert gets.
    """

    options: Mapping[str, Any] = {}
    paired: bool = False
    routed: bool = False

    @abstractmethod
    def add(self, *args: Any, **kwargs: Any) -> None:
        """What a lane of windows gave in a slab: inputs of a linear layer, or sums and states of the scan."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """What adds up over windows, by name, float64 or whole numbers; nothing where nothing was seen. The
        result is made of it: what another process saw may be added to it."""

    @abstractmethod
    def result(self) -> Any:
        """What was seen; raises ValueError where it is not finite."""


class Adding(Observer):
    """An observer whose sums are sums of what each lane gave.

    Of a float32 model that has 24 binary digits (`_short`). The 53 of float64 hold the sum exactly, unless
    some are millions of times larger than others, and an exact sum does not depend on the order of adding, in
    which processes that share the lanes differ.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @final
    def sums(self) -> dict[str, Tensor]:
        return self._sums

    @final
    def _plus(self, **parts: Tensor | int) -> None:
        for name, part in parts.items():
            new = torch.tensor(part) if isinstance(part, int) else part.double()
            self._sums[name] = self._sums[name].add_(new) if name in self._sums else new


def _short(part: Tensor, source: Tensor) -> Tensor:
    """The first 24 binary digits of each number, in float64 and in its range (Veltkamp's splitting); all of
    them where what it was made of is float64."""
    if part.dtype != torch.float64 or source.dtype == torch.float64:
        return part
    wide = part * (2.0**29 + 1)
    return wide - (wide - part)


class InputNorm(Adding):
    """Mean squares of a linear layer's inputs (Wanda)."""

    def add(self, x: Tensor) -> None:
        self._plus(squares=x.square().sum((0, 1)), tokens=x.shape[0] * x.shape[1])

    def result(self) -> Moments:
        if "squares" not in self._sums:
            return Moments(torch.empty(0, dtype=torch.float64), diagonal=True, tokens=0)
        squares, tokens = self._sums["squares"], int(self._sums["tokens"])
        if not torch.isfinite(squares).all():
            raise ValueError("the mean squares of its inputs are not finite")
        return Moments(squares / tokens, diagonal=True, tokens=tokens)


class InputGram(Observer):
    """The Gram of a linear layer's inputs (the Hessian of SparseGPT), if `paired` also that of the dense
    model's inputs against them. Products of a slab in the precision of now (`products`), sums in float64."""

    def __init__(self, paired: bool = False) -> None:
        self.paired = paired
        self._gram, self._cross = products.Sum(), products.Sum()
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """x: (W, T, in), or (W, T, out, in) of a depthwise layer; dense: the same in the dense model."""
        # (in, tokens) or (out, in, tokens): rows last, so that each product is one plain matrix product
        rows = x.flatten(0, 1).movedim(0, -1)
        self._gram.add(rows, rows)
        self._tokens += x.shape[0] * x.shape[1]
        if self.paired:
            assert dense is not None
            self._cross.add(dense.flatten(0, 1).movedim(0, -1), rows)

    def sums(self) -> dict[str, Tensor]:
        taken = {"gram": self._gram.take(), "cross": self._cross.take()}
        if taken["gram"] is not None:
            taken["tokens"] = torch.tensor(self._tokens)
        self._sums |= {name: part for name, part in taken.items() if part is not None}
        return self._sums

    def result(self) -> Moments:
        with torch.inference_mode():  # in which the walk made them
            sums = self.sums()
            if "gram" not in sums:
                return Moments(torch.empty(0, 0, dtype=torch.float64), tokens=0)
            tokens = int(sums["tokens"])
            means = {name: sums.pop(name).div_(tokens) for name in ("gram", "cross") if name in sums}
            return Moments(means["gram"], means.get("cross"), tokens=tokens)


class StateError(Adding):
    """The Gram of output errors per channel (method `exact`)."""

    def __init__(
        self, removed: str, diagonal: bool, weight: Tensor | None = None, rows: int | None = None
    ) -> None:
        """weight: (d_model,) what an error in each coordinate of the layer's output costs; all 1 if None.
        rows: of A_log, where they are heads of several channels."""
        super().__init__()
        self.options: Mapping[str, Any] = {"removed": removed, "gram": "diagonal" if diagonal else "full"}
        self._rows = rows
        self._weight = weight
        self._energy: Tensor | None = None

    def add(self, stats: ScanStats, out_proj: Tensor, output: Tensor) -> None:
        assert stats.gram is not None
        if self._energy is None:  # (D,) what an error in a channel costs the stream
            squares = out_proj.double().square()
            self._energy = squares.sum(0) if self._weight is None else self._weight @ squares
        output_energy = self._energy
        sums = {"gram": stats.gram * output_energy.view(-1, *[1] * (stats.gram.ndim - 1))}
        if stats.cross is not None and stats.power is not None:  # there is a D that could absorb a part
            sums |= {"cross": stats.cross * output_energy[:, None], "power": stats.power * output_energy}
        if self._rows and self._rows < len(output_energy):  # an entry of A_log is of all its head's channels
            sums = {name: x.unflatten(0, (self._rows, -1)).sum(1) for name, x in sums.items()}
        sums["signal"] = output.square().sum((0, 1)).double() @ output_energy
        self._plus(**{name: _short(part, output) for name, part in sums.items()})

    def result(self) -> ErrorSums:
        sums = self._sums
        assert sums, "nothing was observed"
        return ErrorSums(sums["gram"], sums.get("cross"), sums.get("power"), float(sums["signal"]))


@dataclass(frozen=True)
class StateSums:
    """Second moments of the states of a layer, sums over sampled steps; one for each group of heads.

    In residual-stream units: channel d counts with what an error of it costs there, w_d = omega_d gain_d^2.

    Attributes:
        gram: (G, N, N) float64, sum C_n C_m sum_d w_d h_dn h_dm: removing the states R without any repair
            costs 1' gram_RR 1.
        energy: (G, N) float64, sum C_n^2 sum_d h_dn^2, as `StateReadout` but of the sampled steps.
        states: (G, N, N) float64, sum over d and t of w_d h h'. readouts: (G, N, N), sum over t of C C'.
        full: (G, N, N, N, N) float64, [n, n', m, m'] = sum C_n C_n' sum_d w_d h_dm h_dm'; None where there
            are more than `MOST_FULL` states.
    """

    gram: Tensor
    energy: Tensor
    states: Tensor
    readouts: Tensor
    full: Tensor | None


class StateMoments(Adding):
    """Sums what removing whole states costs, and what other readouts of the kept ones could restore."""

    MOST_FULL = 32

    def __init__(self, every: int, weight: Tensor | None = None) -> None:
        """every: look at every so many steps. weight: (d_model,) what an error in the stream costs."""
        super().__init__()
        self.options: Mapping[str, Any] = {"every": every}
        self._weight = weight

    def add(self, h: Tensor, C: Tensor, gain: Tensor, out_proj: Tensor) -> None:
        """h (W, S, D, N): states at S sampled steps; C (W, S, G, N); gain (W, S, D): of the output."""
        squares = out_proj.square()
        cost = squares.sum(0) if self._weight is None else self._weight.to(squares.dtype) @ squares  # (D,)
        groups, states = C.shape[2:]
        h = h.flatten(0, 1).unflatten(1, (groups, -1))  # (S, G, D/G, N): every step of every window
        C = C.flatten(0, 1)
        weight = (gain * cost.sqrt()).flatten(0, 1).unflatten(1, (groups, -1))
        energy = (C.square() * h.square().sum(2)).sum(0)
        h = h * weight[..., None]
        pairs = h.mT @ h  # (S, G, N, N)
        readouts = C[..., :, None] * C[..., None, :]
        self._plus(
            gram=(pairs * readouts).sum(0), energy=energy, states=pairs.sum(0), readouts=readouts.sum(0)
        )
        if states <= self.MOST_FULL:
            steps = (part.movedim(1, 0).flatten(2) for part in (readouts, pairs))  # (G, S, N N)
            left, right = (part.double() for part in steps)
            self._plus(full=_short(left.mT @ right, h))

    def result(self) -> StateSums:
        """Raises ValueError: sums that are not finite, of states whose squares float32 cannot hold."""
        sums = self._sums
        assert sums, "nothing was observed"
        if not all(torch.isfinite(part).all() for part in sums.values()):
            raise ValueError("sums over its states are not finite")
        full, states = sums.get("full"), sums["gram"].shape[-1]
        full = None if full is None else full.view(-1, *[states] * 4)
        return StateSums(sums["gram"], sums["energy"], sums["states"], sums["readouts"], full)


class StateReadout(Adding):
    """What each state puts out: the sum of GHOST (arXiv 2602.11408), C_n^2 sum_d h_dn^2 over all steps."""

    options: Mapping[str, Any] = {"every": 1}

    def add(self, h: Tensor, C: Tensor, gain: Tensor, out_proj: Tensor) -> None:
        """As `StateMoments.add`."""
        heads = h.unflatten(2, (C.shape[2], -1))
        norms = torch.linalg.vector_norm(heads, dim=3, dtype=torch.float64)  # (W, S, G, N)
        self._plus(energy=_short((C * norms).square().sum((0, 1)), h))

    def result(self) -> Tensor:
        """(G, N) float64, one row for each group of heads."""
        assert self._sums, "nothing was observed"
        energy = self._sums["energy"]
        if not torch.isfinite(energy).all():
            raise ValueError("the sums over its states are not finite")
        return energy


class PairMoments(Adding):
    """Sums what states with the decay of one and the input of another would do, for every such pair: all that
    a least squares over inputs and readouts of the kept states needs."""

    def __init__(self, every: int, decays: Tensor, inputs: Tensor, weight: Tensor | None = None) -> None:
        """decays, inputs: (pairs,) int64, the state whose decay and whose input each pair has."""
        super().__init__()
        self.options: Mapping[str, Any] = {"every": every, "pairs": (decays, inputs)}
        self._weight, self._pairs = weight, len(decays)

    def add(self, h: Tensor, C: Tensor, gain: Tensor, out_proj: Tensor) -> None:
        """As `StateMoments.add`, of one group; h (W, S, D, pairs)."""
        squares = out_proj.square()
        cost = squares.sum(0) if self._weight is None else self._weight.to(squares.dtype) @ squares
        h = (h * (gain * cost.sqrt())[..., None]).flatten(0, 1)  # (S, D, pairs): every step of every window
        C = C.flatten(0, 1)[:, 0]  # (S, N)
        products = (h.mT @ h).flatten(1)
        readouts = (C[:, :, None] * C[:, None, :]).flatten(1)
        self._plus(full=readouts.mT @ products)

    def result(self) -> Tensor:
        """(N, N, pairs, pairs) float64: [n, n', p, p'] = sum C_n C_n' sum_d w_d h_dp h_dp'."""
        assert self._sums, "nothing was observed"
        full = self._sums["full"]
        states = math.isqrt(len(full))
        return full.view(states, states, self._pairs, self._pairs)
