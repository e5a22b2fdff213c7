"""A layer of a hybrid model: Mamba, attention, an MLP, experts, or several of them.

A layer is run by its own stock code. Only three things inside it are ours for the time of a call: the Mamba
mixer is computed by `mamba1.py` or `mamba2.py` with a state, attention gets the keys and values of earlier
slabs (`attention.py`), and experts are run one by one while somebody looks at them (`experts.py`). What a
linear layer is fed comes to its tap by a hook. So whatever else a family does between these parts
(multipliers, positions, routers, adapters) is right by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsessm.architectures import experts
from sparsessm.architectures.attention import Keys, causal_mask, positions
from sparsessm.architectures.base import Block, Tap
from sparsessm.architectures.computing import instead
from sparsessm.architectures.kept import Kept
from sparsessm.architectures.mixer import MixerKind
from sparsessm.architectures.outputs import kept_outputs
from sparsessm.architectures.target import Target
from sparsessm.kernels import products


class HybridState(NamedTuple):
    """What a block carries from one slab of time to the next."""

    start: int = 0  # tokens so far
    mixer: Any = None
    keys: tuple[Tensor, Tensor] | None = None  # of attention, with the values


class Setting(NamedTuple):
    """What the blocks of a model have in common.

    Attributes:
        kind: of the Mamba mixers.
        order: paths inside a layer where a mixer, linear layers and experts may be, in the order of the data.
        rotary: stock module that makes position embeddings, None if the model has none.
        stored: parameter name -> dtype of its checkpoint.
        carries_embedding: the stream is twice as wide, with the embedding behind, which attention reads too
            (Zamba2).
    """

    kind: MixerKind
    order: tuple[str, ...]
    rotary: Any
    stored: Mapping[str, torch.dtype]
    carries_embedding: bool = False


class _Reached(Exception):
    """The tap of `until` was fed."""


# Linear layers of attention and MLPs that read what the module does, whichever of them a module has.
FIRST = {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj"}


class HybridBlock(Block):
    """One stock layer, whatever is in it."""

    def __init__(self, setting: Setting, layer: Any, index: int, uses: Mapping[str, tuple[int, ...]]) -> None:
        """uses: path of a linear layer inside this one -> the blocks that share its weight, if there are."""
        self.index, self.name, self.layer = index, f"model.layers.{index}", layer
        self._setting, self._uses = setting, uses
        self._mixer: Any = None
        self._experts: Any = None
        self._expert_kinds: set[str] = set()
        self._linear: dict[str, nn.Linear] = {}  # kind -> module; those inside the mixer left out
        self._names: dict[str, str] = {}  # kind -> name of its target
        self._captured: dict[str, Tensor] | None = None
        self.targets = tuple(self._found())
        self.axes = () if self.mixer is None else setting.kind.axes(self._mixer, f"{self.mixer}.")
        self.attends = "o_proj" in self._linear

    def _found(self) -> Iterator[Target]:
        """The targets in the order of the data, noting where they are."""
        kind, order, stored = self._setting.kind, self._setting.order, self._setting.stored
        for path in order:
            module, full = inside(self.layer, path), f"{self.name}.{path}."
            if module is None or (self.mixer is not None and path.startswith(f"{self.mixer}.")):
                continue  # nothing, or a part of the mixer
            if kind.owns(module):
                self.mixer, self._mixer = path, module
                mixed = kind.targets(module, full, self.index, stored)
                self._names |= {target.kind: target.name for target in mixed}
                yield from mixed
            elif isinstance(module, nn.Linear):
                own = path.rpartition(".")[2]
                self._linear[own] = module
                if (target := self._target(path, module, own)) is not None:
                    yield target
            elif experts.is_experts(module):
                self._experts = module
                for own, target in experts.targets(module, full, self.index, stored):
                    self._expert_kinds.add(own)
                    self._names[own] = target.name
                    yield target

    def _target(self, path: str, module: nn.Linear, kind: str) -> Target | None:
        """A linear layer as a target; None if an earlier block has it."""
        uses = self._uses.get(path, (self.index,))
        self._names[kind] = name = f"model.layers.{uses[0]}.{path}.weight"
        dtype = self._setting.stored.get(name, module.weight.dtype)
        if uses[0] != self.index:
            return None
        shared = uses if len(uses) > 1 else ()
        reads = path.rpartition(".")[0] if kind in FIRST and not shared else ""
        owned = "projections", kind, self.index, module.weight, dtype
        return Target(name, *owned, uses=shared, reads=reads)

    def forward(
        self,
        hidden: Tensor,
        state: HybridState | None = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, HybridState]:
        before, watched = state or HybridState(), taps or {}
        mixed, keys = before.mixer, Keys(before.keys)

        def fed(kind: str, x: Tensor, rows: Tensor | None = None) -> None:
            if (tap := watched.get(kind)) and x.shape[1]:
                # Of an expert's tokens somebody may want to know which they are.
                tap.add(x, rows=rows) if tap.routed else tap.add(x)
            if kind == until:
                raise _Reached

        def made(kind: str, x: Tensor) -> None:
            if self._captured is not None:
                self._captured[self._names[kind]] = x

        def mix(hidden_states: Tensor, **_: Any) -> Tensor:
            nonlocal mixed
            out, mixed = self._setting.kind.forward(self._mixer, hidden_states, mixed, watched, until, kept)
            if out is None:
                raise _Reached
            return out

        def route(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return experts.run(self._experts, hidden_states, top_k_index, top_k_weights, fed, made)

        wanted = {*watched, until}
        with ExitStack() as stack:
            for kind, module in self._linear.items():
                if kind in wanted:
                    hook = module.register_forward_pre_hook(_feeding(fed, kind, hidden))
                    stack.callback(hook.remove)
            if self._mixer is not None:
                stack.enter_context(instead(self._mixer, mix))
            if self._experts is not None and (
                self._captured is not None
                or wanted & self._expert_kinds
                or products.rounds()
                or not experts.groups(self._experts)
            ):
                stack.enter_context(instead(self._experts, route))
            try:
                out = self._through(hidden, before.start, keys)
            except _Reached:
                out = None
        return out, HybridState(before.start + hidden.shape[1], mixed, keys.past)

    def _through(self, hidden: Tensor, start: int, keys: Keys) -> Tensor:
        """The stock layer on a slab that comes after `start` tokens."""
        if self._setting.carries_embedding:
            stream, embedded = hidden.chunk(2, -1)
            beside = self._beside(stream, start, keys, "causal_mask")
            out = self.layer(stream, original_hidden_states=embedded, layer_idx=self.index, **beside)
            return torch.cat([out, embedded], -1)
        out = self.layer(hidden, **self._beside(hidden, start, keys))
        return out[0] if isinstance(out, tuple) else out

    def _beside(self, hidden: Tensor, start: int, keys: Keys, mask: str = "attention_mask") -> dict[str, Any]:
        """The stock layer's arguments for attention; of the mixer's nothing is needed, it has our state."""
        if not self.attends:  # some layers ask for what only attention uses
            return {} if self._setting.rotary is None else {"position_embeddings": None}
        given: dict[str, Any] = {mask: causal_mask(start, hidden), "past_key_values": keys}
        if self._setting.rotary is not None:
            given["position_embeddings"] = self._setting.rotary(hidden, positions(start, hidden))
        return given

    def linear(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {self._names[kind]: module for kind, module in self._linear.items()}
        if self._mixer is not None:
            own = f"{self.name}."
            paths = {n: n.removeprefix(own).removesuffix(".weight") for n in self._names.values()}
            parts = {name: inside(self.layer, path) for name, path in paths.items()}
            found |= {name: part for name, part in parts.items() if isinstance(part, nn.Linear)}
        return found

    @contextmanager
    def outputs(self) -> Iterator[dict[str, Tensor]]:
        with kept_outputs(self.linear()) as captured:
            self._captured = captured if self._experts is not None else None
            try:
                yield captured
            finally:
                self._captured = None

    def copy(self) -> HybridBlock:
        return HybridBlock(self._setting, copy.deepcopy(self.layer), self.index, self._uses)


def inside(module: nn.Module, path: str) -> nn.Module | None:
    """The module that a dotted path leads to, None if it leads nowhere."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _feeding(fed: Callable[[str, Tensor], None], kind: str, slab: Tensor) -> Callable[..., None]:
    """A hook that feeds a tap (W, T, in), also where stock code puts windows and time into one dimension, or
    gives a matrix all tokens so far (that of compressed keys and values, KimiLinear)."""
    windows, steps = slab.shape[:2]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        fed(kind, x.reshape(windows, -1, x.shape[-1])[:, -steps:])

    return hook
