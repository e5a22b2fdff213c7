"""One row of a report: what happened to one target.

Place in the flow: a plan makes one for each target, a `Report` (record.py) gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What happened to one target.

    Attributes:
        target: full parameter name, as in the checkpoint.
        layer: index of its block.
        family: "ssm", "projections", "conv1d", "head" or "embedding".
        method, pattern: as in the recipe, or the family's own.
        removed: what an entry became, see `REMOVED_WORDS`.
        total: entries of the matrix.
        pruned: entries removed, counted from the mask and not from values.
        allocation, repair, price: as they were applied; "none" where they were not.
        damping: share of its mean diagonal that the Hessian got added: 0.01, more if it was singular; None
            without a Hessian.
        error: energy of the output error with the layer's input fixed, against what the repair aims at; None
            where the method does not know it.
        signal: energy of the layer's output, in the unit of `error`.
        tokens: calibration tokens that an expert saw. inputs: of its matrix. borrowed: share of its moments
            that is its layer's. None elsewhere.
        repaired: other parameters that were changed to make up for the removal, by full name.
        grid: the values that weights could take, or how many bits were asked for; "none": any.
        bits: stored for the matrix on its grid, masks and scales counted. entropy: the same under an ideal
            code. step: of the dial. None where there is none.
    """

    target: str
    layer: int
    family: str
    method: str
    pattern: str
    removed: str
    total: int
    pruned: int
    allocation: str = "uniform"
    repair: str = "none"
    price: str = "none"
    damping: float | None = None
    error: float | None = None
    signal: float | None = None
    tokens: int | None = None
    inputs: int | None = None
    borrowed: float | None = None
    repaired: tuple[str, ...] = ()
    grid: str = "none"
    bits: int | None = None
    entropy: float | None = None
    step: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of entries removed."""
        return self.pruned / self.total if self.total else 0.0

    @property
    def starved(self) -> bool:
        """Whether it is an expert's that saw fewer tokens than it has inputs."""
        return self.tokens is not None and self.inputs is not None and self.tokens < self.inputs

    @property
    def relative_error(self) -> float | None:
        """error / signal; None if either is unknown."""
        return relative(self.error, self.signal)


def relative(error: float | None, signal: float | None) -> float | None:
    """error / signal; None if either is unknown."""
    return error / signal if error is not None and signal else None
