"""WHAT can be pruned in a model: the words every adapter speaks.

An adapter wraps a stock transformers model. It declares what each layer (`Block`) has to be pruned, matrices
(target.py) and whole units (axes.py), and computes the layer's forward with the model's own weights around
our kernels, in slabs of time, so that calibration can advance all windows together. It knows nothing of
methods: what is measured comes in as a `Tap`.

Letters used in formulas, here and in the kernels (Gu & Dao, arXiv 2312.00752):

    W windows · L tokens a window · T tokens a slab · D channels (d_inner) · N states a channel (d_state)
    K width of the convolution · u input of the scan (W, T, D) · Δ or delta, step size (W, T, D)
    A = -exp(A_log) (D, N) · B, C input and readout (W, T, N) · D skip weight (D,) · z gate (W, T, D)
    h state (W, D, N): h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = (C_t·h_t + D u_t)·silu(z_t)

Mamba-2 (Dao & Gu, arXiv 2405.21060) has one A, Δ and D for each of H heads of P channels (D = H P), and one B
and C for each of G groups of heads; its A_log is a matrix of one column here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from sparsessm.architectures.axes import Axis
from sparsessm.architectures.computing import computing
from sparsessm.architectures.kept import Kept
from sparsessm.architectures.ranks import Alone, Ranks
from sparsessm.architectures.residence import InMemory, Residence
from sparsessm.architectures.target import Target
from sparsessm.kernels.products import FLOAT32, Choice


class Tap(Protocol):
    """What watches a target while its block runs (methods/observers.py).

    The tap of a linear layer is fed its inputs, `add(x)` with x (W, T, in). That of `A_log` is fed what the
    scan summed, `add(stats, out_proj, y)`, with the weight (d_model, D) that its output y (W, T, D) meets
    next.

    Attributes:
        options: of `A_log`, go to `selective_scan_stats`.
        paired: it wants the inputs in both models, the pruned and the dense one, `add(x, dense)`.
        routed: of an expert, it wants to know which of the slab's tokens it is fed, `add(x, rows=rows)`.
    """

    options: Mapping[str, Any]
    paired: bool
    routed: bool

    def add(self, *what: Any, **how: Any) -> None: ...


class Block(ABC):
    """One layer of the model: residual stream in, residual stream out.

    Attributes:
        targets: in the order in which data meets them.
        axes: what can be taken out of it whole.
        layer: the stock layer; of the tail the head with what is beside it, which never leave memory.
        mixer: name of the Mamba mixer inside it, None if it has none.
        attends: whether it has attention.
    """

    index: int
    name: str
    targets: tuple[Target, ...]
    axes: tuple[Axis, ...] = ()
    layer: nn.Module
    mixer: str | None = None
    attends: bool = False

    @property
    @final
    def device(self) -> torch.device:
        """Where its weights are, and where it computes, while it is open."""
        return next(self.layer.parameters()).device

    def target(self, kind: str) -> Target:
        """Its target of a kind.

        Raises:
            ValueError: it has none of that kind; those that it has are listed.
        """
        for target in self.targets:
            if target.kind == kind:
                return target
        known = ", ".join(target.kind for target in self.targets) or "none"
        raise ValueError(f"{self.name} has no target {kind!r}; it has: {known}")

    @abstractmethod
    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, Any]:
        """Run a slab (W, T, d_model) after `state` (None: the beginning); returns output and next state.

        Args:
            taps: a target's kind -> what watches it.
            until: stop once the tap of this kind was fed; the output is then None.
            kept: where results of its mixer are kept that are final (kept.py).
        """

    @abstractmethod
    def linear(self) -> dict[str, nn.Module]:
        """Its linear layers, by target name; those that are targets of an earlier block are among them."""

    @final
    def computing(self, compute: str) -> AbstractContextManager[None]:
        """Its products have this precision meanwhile, "float32" or "bfloat16" (kernels/products.py).

        Its weights must stay as they are, and have no gradient where products are rounded.
        """
        return computing(self.linear().values(), compute)

    @abstractmethod
    def outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Yields what holds the outputs of its linear layers and experts, by target name, after a forward.

        Linear layers that are targets of an earlier block are among them, the head is not. Linear layers:
        (W, T, out); experts: (tokens sent to it, out).
        """

    @abstractmethod
    def copy(self) -> Block:
        """The same block with weights of its own, which later changes of the model do not touch."""


class Tail(Block):
    """What follows the layers: the final norm and the head. An embedding of its own weights is a target here
    too: it is pruned after all others, and no walk needs to stop before the first layer."""

    def __init__(
        self,
        norms: tuple[Callable[[Tensor], Tensor], nn.Module],
        head: Any,
        name: str,
        index: int,
        stored: Mapping[str, torch.dtype],
        embedding: tuple[str, Any],
    ) -> None:
        """
        Args:
            norms: what the head reads of the stream, and the module in it. name: of the head's weight.
            embedding: name of its weight, which may be the head's, and module.
        """
        self.index, self.name = index, name.removesuffix(".weight")
        (self._norm, norm), self._head = norms, head
        dtype = stored.get(name, head.weight.dtype)
        self.targets = (Target(name, "head", "lm_head", index, head.weight, dtype),)
        self.layer = nn.ModuleList([head, norm])
        looked_up, module = embedding
        if module.weight is not head.weight:
            dtype, kind = stored.get(looked_up, module.weight.dtype), looked_up.split(".")[-2]
            how: dict[str, Any] = {"module_class": "Embedding"}
            table = Target(looked_up, "embedding", kind, index, module.weight, dtype, **how)
            self.targets = (*self.targets, table)
            self.layer.append(module)

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, Any]:
        if tap := (taps or {}).get("lm_head"):
            tap.add(self._norm(hidden))
        return hidden, None

    def linear(self) -> dict[str, nn.Module]:
        return {self.targets[0].name: self._head}

    def outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        return nullcontext({})

    def copy(self) -> Tail:
        return self  # the norm is never pruned


class Architecture(ABC):
    """A stock model seen as embedding, blocks and head; in evaluation mode and without gradients.

    Attributes:
        blocks: the layers.
        tail: a last block, identity on the residual stream, whose targets are behind the layers (the head).
        tied: the head's weight is the embedding.
        states: d_state.
        structure: the axes along which it can shrink to a stock model, "block" among them.
        projects: whether its states can be projected, for our runtime alone. widens: whether its layers can
            have channels of their own number, for our runtime alone.
        stored: parameter name -> dtype of its checkpoint.
        residence: where the weights of its blocks are while no walk stands there.
        compute: the precision of products where a walk runs its blocks.
        ranks: the processes that work on the model together.
    """

    model: nn.Module
    residence: Residence = InMemory()
    blocks: tuple[Block, ...]
    tail: Block
    tied: bool
    states: int
    structure: tuple[str, ...] = ()
    projects: bool = False
    widens: bool = False
    stored: Mapping[str, torch.dtype]
    compute: Choice = FLOAT32
    ranks: Ranks = Alone()

    @abstractmethod
    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The fields of the stock configuration that say that every layer has these sizes.

        Args:
            sizes: axis -> units of each of a layer's axes of that name; what is not named stays as it is.

        Raises:
            ValueError: transformers cannot express them.
        """

    def sizes(self, axis: str) -> list[int]:
        """All sizes smaller than now that transformers can express, ascending; of each of a layer's axes."""
        if axis == "block":
            return list(range(1, len(self.blocks)))
        now = next((a.size for block in self.blocks for a in block.axes if a.name == axis), 1)
        found = []
        for size in range(1, now):
            try:
                self.fields({axis: size})
            except ValueError:
                continue
            found.append(size)
        return found

    @abstractmethod
    def resize(self, block: Block, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
        """Put a stock layer of another shape in the place of a block; the model's config is left as it is.

        Args:
            fields: of the stock configuration, in which the new layer differs.
            tensors: its state, by name inside the layer.

        Returns:
            The new block, which also takes its place in `blocks`.
        """

    def may_go(self, gone: Collection[int]) -> list[int]:
        """The blocks that can be taken out beside those that go already, so that stock code runs the rest.

        Stock caches want a layer of attention where there were some, and the rest a mixer.
        """
        left = [block for block in self.blocks if block.index not in gone]
        mixers = [block for block in left if block.mixer is not None]
        attending = [block for block in left if block.attends]
        last = [kind[0] for kind in (mixers, attending) if len(kind) == 1]
        return [block.index for block in left if block not in last]

    @abstractmethod
    def drop(self, index: int) -> None:
        """Take a whole block out of the model; those behind it move up, config and `stored` follow.

        Raises:
            ValueError: "block" is not in `structure`.
        """

    @abstractmethod
    def project(self, block: Block, B: Tensor, C: Tensor) -> Block:
        """Put projections of B and C (G, r, N) behind the convolution of a block's mixer (projected.py).

        Returns:
            The new block, which also takes its place in `blocks`.

        Raises:
            ValueError: not `projects`.
        """

    @final
    def copied(self) -> tuple[nn.Module, Mapping[str, torch.dtype], Residence, str]:
        """What `adapt` makes an architecture of that can be changed without changing this one."""
        model, residence = self.residence.copied(self.model)
        return model, self.stored, residence, self.compute.used

    @final
    def holding(self, index: int) -> AbstractContextManager[None]:
        """The weights of a block, or of the tail, are in memory inside."""
        block = self.tail if index == len(self.blocks) else self.blocks[index]
        return self.residence.holding(block)

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Write fields into the model's own configuration, when all layers have their new shapes."""
        for name, value in fields.items():
            setattr(self.model.config, name, value)

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """(W, L) token ids -> (W, L, d_model), a new tensor."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """(..., d_model) after the last block -> (..., vocabulary): final norm and output projection."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """What the head's outputs are multiplied by."""

    @abstractmethod
    def looked_up(self, grad: Tensor) -> Tensor:
        """The gradient (W, L, d_model) at the rows of the embedding, of one at what `embed` makes of them."""

    @property
    def targets(self) -> Iterator[Target]:
        return (target for block in (*self.blocks, self.tail) for target in block.targets)


def renumbered(stored: Mapping[str, torch.dtype], layers: str, gone: int) -> dict[str, torch.dtype]:
    """The dtypes of a checkpoint whose layer number `gone` is taken out; `layers` is the name before it."""
    found = {}
    for name, dtype in stored.items():
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            if int(number) == gone:
                continue
            name = f"{layers}{int(number) - (int(number) > gone)}.{rest}"
        found[name] = dtype
    return found
