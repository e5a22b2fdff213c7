"""The native engine: a token of decoding is one call, a prompt goes through products of whole slabs.

Place in the flow: an `Engine` (base.py), made from a packed or stock checkpoint's tensors. What is the same
for all models is here; what a model consists of says `families.py`, and part.py names the kinds of parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.shelf import Unread, give_back, shapes_of
from sparsessm.kernels.matrix import Decoder, Matrix
from sparsessm.runtime import plan
from sparsessm.runtime.attention import Attention
from sparsessm.runtime.base import joined, trace
from sparsessm.runtime.delta import Delta
from sparsessm.runtime.families import plan_of
from sparsessm.runtime.keys import Keys, checked_form
from sparsessm.runtime.latent import Latent
from sparsessm.runtime.mamba1 import Mamba1
from sparsessm.runtime.mamba2 import Mamba2
from sparsessm.runtime.mixer import Mixer
from sparsessm.runtime.mlp import Experts, Mlp, Plain
from sparsessm.runtime.part import Part, Place, Products
from sparsessm.runtime.plan import Plan
from sparsessm.runtime.weights import Weights, matrix

SLAB = 512  # tokens of a prompt that are in memory together
FEW = 8  # tokens that cost less one by one than as a slab, measured on one thread (docs/runtime.md)
MIXERS: Mapping[bool, type[Mamba1] | type[Mamba2]] = {False: Mamba1, True: Mamba2}  # by `plan.Mamba.dual`


class Traced(Unread):
    """Tensors that leave their part of the engine's fingerprint when they are asked for."""

    def __init__(self, tensors: Mapping[str, PackedTensor]) -> None:
        self._tensors, self._traces = tensors, dict[str, dict[str, str]]()
        self._shapes = shapes_of(tensors)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `Unread.shapes`."""
        return self._shapes

    def __getitem__(self, name: str) -> PackedTensor:
        found = self._tensors[name]
        if name not in self._traces:
            self._traces[name] = {part: trace(part, array) for part, array in found.parts.items()}
        return found

    def traces(self) -> dict[str, str]:
        """Of all arrays of all tensors."""
        for name in self._tensors:
            if name not in self._traces:
                self[name]
        return {part: told for parts in self._traces.values() for part, told in parts.items()}


class NativeEngine:
    """A model in native code; weights in the precision they are stored in, everything else in float32."""

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, PackedTensor],
        threads: int | None = None,
        keys: str = "float32",
    ) -> None:
        """Lay out the weights.

        Args:
            config: a configuration of transformers of a type of `base.FIELDS`, or alike.
            tensors: of a packed or stock checkpoint, checked, by their stock names. Each is asked for once,
                if all are used, and not kept: they may be read from a file just then.
            threads: of decoding; torch's number if None.
            keys: a form of `keys.FORMS`.
        """
        int8 = checked_form(keys) == "int8"
        told, tensors = plan_of(config), Traced(tensors)
        self._plan, self._threads, self._epsilon = told, threads, told.epsilon
        # The largest first: while one is laid out it is in memory twice.
        self._embedding = matrix(tensors[told.embedding])
        own = "lm_head.weight" in tensors
        self._head = matrix(tensors["lm_head.weight"]) if own else self._embedding
        self._parts = list(_parts(told, tensors, int8))
        self._norm = told.norm_of(tensors[told.norm].decode(torch.float32))
        if told.logit_scale != 1:
            self._norm = self._norm * told.logit_scale
        sizes = {"width": int(config.hidden_size), "vocabulary": int(config.vocab_size)}
        rest = {"norm": self._norm, "embedding": self._embedding, "head": self._head, "int8": int8}
        if told.embedding_scale != 1:
            rest |= {"embedding_scale": told.embedding_scale}
        if told.angles is not None:
            rest |= {"turns": told.angles, "turned": told.turned}
        natives = [part.native() for part in self._parts]
        self._decoder = Decoder(sizes | {"epsilon": self._epsilon} | _sizes(told), natives, rest)
        self.vocabulary, self.state_size = self._decoder.vocabulary, self._decoder.state_size
        self.keys = Keys(self.state_size, self._decoder.block, int8)
        self._sizes = [part.state_size for part in self._parts]
        assert self.state_size == sum(self._sizes) + bool(self.keys.block)
        assert self.keys.block == sum(part.block for part in self._parts)
        orders = dict.fromkeys(MIXERS[mixer.dual].ORDER for mixer in told.mixers)
        orders |= {Delta.ORDER: None} if any(isinstance(part, Delta) for part in self._parts) else {}
        orders |= {part.ORDER: None for part in self._parts if isinstance(part, (Attention, Latent))}
        orders |= {"int8": None} if int8 and self.keys.block else {}
        self.layout = joined(config, tensors.traces(), "; ".join(orders))

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        return self._head.nbytes + sum(part.nbytes for part in self._parts)

    @property
    def resident(self) -> int:
        """As `Engine.resident`; vectors are held twice, for prompts and for decoding."""
        parts = [self._embedding, self._norm, self._norm]
        parts += [] if self._head is self._embedding else [self._head]
        parts += [held for part in self._parts for held in part.held()]
        # layers may share a matrix
        matrices = {id(part): part for part in parts if isinstance(part, Matrix)}
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return sum(part.nbytes for part in (*matrices.values(), *tensors))

    @property
    def sections(self) -> list[tuple[int, int]]:
        """As `Engine.sections`."""
        mixers = [part for part in self._parts if isinstance(part, (Mixer, Delta))]
        return [(part.inputs, part.state_size - part.inputs) for part in mixers]

    def new_state(self, batch: int) -> Tensor:
        """As `Engine.new_state`."""
        return torch.zeros(batch, self.state_size)

    def step(self, tokens: Tensor, states: Tensor | list[Tensor]) -> Tensor:
        """As `Engine.step`."""
        return self._decoder.step(tokens, states, self._threads or torch.get_num_threads())

    @torch.no_grad()
    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """As `Engine.prompt`."""
        logits, slabs = [], tokens.split(SLAB)
        for slab in slabs:
            if len(slab) <= FEW:
                logits += [self.step(token, state[None]) for token in slab.split(1)]
                continue
            hidden = self._read(slab, state)
            if every or slab is slabs[-1]:
                logits.append(self._logits(hidden if every else hidden[-1:]))
        return torch.cat(logits) if every else logits[-1][0]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head.linear(self._normed(hidden, self._norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._epsilon)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """(L,) tokens -> (L, d_model) after the last layer; the state is advanced."""
        told, keys = self._plan, self.keys
        kept = keys.reading(state, len(tokens), told.angles, told.turned)
        hidden = torch.stack([self._embedding.row(token) for token in tokens.tolist()])
        if told.embedding_scale != 1:
            hidden *= told.embedding_scale
        both = any(part.place.reads == "both" for part in self._parts)
        embedded, x, beside = hidden.clone() if both else hidden, hidden, hidden
        own_parts = state[: sum(self._sizes)].split(self._sizes)
        for part, own in zip(self._parts, own_parts, strict=True):
            place = part.place
            if place.reads != "before":
                x = _source(place.reads, hidden, embedded, beside)
                if place.norm is not None:
                    x = self._normed(x, place.norm)
            out = part.read(x, own, kept)
            if place.after is not None:
                out = self._normed(out, place.after)
            if place.scale != 1:
                out = out * place.scale
            if place.beside:
                beside = out
            else:
                hidden += out
        if keys.block:
            state[keys.fixed - 1] += len(tokens)
        return hidden


def _source(reads: str, hidden: Tensor, embedded: Tensor, beside: Tensor) -> Tensor:
    """What a part reads (`Planned.reads`)."""
    if reads == "both":
        return torch.cat([hidden, embedded], -1)
    if reads == "sum":
        return hidden + beside
    return beside if reads == "side" else hidden


def _parts(told: Plan, tensors: Traced, int8: bool) -> Iterator[Part]:
    """The parts of all layers, with their weights."""
    whole = Weights(tensors, "")
    products, at = Products(whole), 0
    for planned in told.parts:
        give_back()  # else small things that stay keep the pages of large ones that went
        norm = None if planned.norm is None else told.norm_of(whole.vector(planned.norm))
        after = None if planned.after is None else told.norm_of(whole.vector(planned.after))
        place, what = Place(norm, planned.reads, planned.beside, planned.scale, after), planned.what
        if isinstance(what, plan.Mamba):
            part: Part = MIXERS[what.dual](what.config, Weights(tensors, f"{what.name}."), place)
        elif isinstance(what, plan.Delta):
            part = Delta(what, products, whole, place)
        elif isinstance(what, plan.Attention):
            part = Attention(what, products, place, at, told, int8)
        elif isinstance(what, plan.Latent):
            part = Latent(what, products, whole, place, at, int8)
        elif isinstance(what, plan.Mlp):
            part = Mlp(what, products, place)
        elif isinstance(what, plan.Experts):
            part = Experts(what, products, whole, place)
        else:
            part = Plain(what, products, place)
        at += part.block
        yield part


def _sizes(told: Plan) -> dict[str, Any]:
    """What the decoder asks for of the mixers, which are alike in a model."""
    if not told.mixers:
        return {"states": 1, "taps": 1, "rank": 1}
    mixer = told.mixers[0]
    sizes = {"states": int(mixer.config.state_size), "taps": int(mixer.config.conv_kernel)}
    return sizes | MIXERS[mixer.dual].sizes(mixer.config)
