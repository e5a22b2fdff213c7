"""What a model consists of: a list of parts, each with the names of its tensors, and what is around them.

Place in the flow: `families.py` reads it off a configuration; both engines are made of it. Nothing here has
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A linear layer.

    Attributes:
        name: of the stock module; its tensors are `name.weight` and maybe `name.bias`.
        scale: of all that it gives. inputs: of what it reads.
        adapter: name of the two linear layers of an adapter, whose output is added; "" if there is none.
    """

    name: str
    scale: float = 1.0
    inputs: float = 1.0
    adapter: str = ""


@dataclass(frozen=True)
class Mamba:
    """A mixer.

    Attributes:
        name: of the stock module. dual: of Mamba-2, else of Mamba-1.
        config: its sizes, in the words of `MambaConfig` or `Mamba2Config`.
    """

    name: str
    dual: bool
    config: Any


@dataclass(frozen=True)
class Rows:
    """Some rows of a linear layer.

    Attributes:
        name: of the stock module. rows: which, in their order here; None: all.
        narrow: name of a linear layer whose output it reads; "" if it reads what the mixer reads.
    """

    name: str
    rows: Tensor | None = None
    narrow: str = ""


@dataclass(frozen=True, eq=False)
class Delta:
    """A mixer of the gated delta rule.

    Attributes:
        name: of the stock module, which has conv1d. decay: of the one that has A_log and dt_bias.
        mixed: queries, keys and values of all heads, one behind the other. gate, step, beta: of all heads.
        out: the last projection. norm: name of the weight of each head's norm. epsilon: of it.
        groups, keys: of queries and keys, channels of each. heads, channels: of values.
        taps: of the convolution. most: the largest share of a correction that is written.
        by_channel: whether step has a row for each channel. curve: of the gate, "silu" or "sigmoid".
    """

    name: str
    decay: str
    mixed: Sequence[Rows]
    gate: Rows
    step: Rows
    beta: Rows
    out: Product
    norm: str
    epsilon: float
    groups: int
    keys: int
    heads: int
    channels: int
    taps: int
    most: float = 1.0
    by_channel: bool = False
    curve: str = "silu"


@dataclass(frozen=True)
class Attention:
    """Causal attention.

    Attributes:
        heads, shared, width: heads of queries, of keys and values, channels of each.
        scale: of the scores. rotary: queries and keys are turned by their position.
        gated: q gives of each head the queries and then a gate, whose sigmoid multiplies what the head gives.
        q_norm, k_norm: names of the weights of norms of each head's queries and keys; "" if there are none.
        norm_whole: those norms are of all heads together.
    """

    q: Product
    k: Product
    v: Product
    o: Product
    heads: int
    shared: int
    width: int
    scale: float
    rotary: bool
    gated: bool = False
    q_norm: str = ""
    k_norm: str = ""
    norm_whole: bool = False


@dataclass(frozen=True)
class Latent:
    """Latent attention without positions (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        q: of each head `own` channels and then `common` ones. narrow: what q reads comes out of it; None: q
            reads what the part reads.
        row: of a token the `rank` numbers that keys and values of all heads are made of, and the `common`
            channels that all heads' keys have beside their own.
        wide: of each head the `own` channels of its key and the `width` of its value, of the `rank` numbers.
        scale: of the scores. q_norm, norm: names of the weights of the norms of what `narrow` gives, and of
            the `rank` numbers. epsilon: of both.
    """

    narrow: Product | None
    q: Product
    row: Product
    wide: Product
    o: Product
    heads: int
    rank: int
    common: int
    own: int
    width: int
    scale: float
    q_norm: str
    norm: str
    epsilon: float

    @property
    def kept(self) -> int:
        """Numbers that a token leaves."""
        return self.rank + self.common


@dataclass(frozen=True)
class Mlp:
    """Of two or three matrices; gate and up of one name are the halves of one tensor.

    Attributes:
        curve: a name of `mlp.CURVES`.
        share: of one row, whose sigmoid multiplies what the MLP gives.
    """

    gate: Product | None
    up: Product
    down: Product
    curve: str
    share: Product | None = None


@dataclass(frozen=True)
class Experts:
    """MLPs of which a router chooses some for each token.

    Attributes:
        wide, down: names of tensors (experts, out, in); `wide` has gate and up, one above the other, if
            `gated`.
        before, behind: linear layers around the experts.
        choice: "softmax" of all logits; "softmax_of_chosen"; "sigmoid" of all, chosen with `favour` added
            from the `chosen_groups` best of `groups`, and `normalised` or not, times `factor`.
        favour: name of the tensor (experts,).
    """

    router: Product
    wide: str
    down: str
    gated: bool
    curve: str
    chosen: int
    choice: str
    before: Product | None = None
    behind: Product | None = None
    favour: str | None = None
    groups: int = 1
    chosen_groups: int = 1
    normalised: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Plain:
    """A linear layer alone."""

    product: Product


@dataclass(frozen=True)
class Planned:
    """A part of a layer.

    Attributes:
        norm: name of the weight of the norm of what it reads; None: it reads that as it is.
        reads: "stream"; "before", what the part before it read; "both", the stream and the embedding one
            behind the other; "side", what a part gave `beside` the stream; "sum" of that and the stream.
        beside: what it gives replaces what is beside the stream, else it is added to the stream.
        scale: of what it gives.
        after: name of the weight of the norm of what it gives; None: it goes to the stream as it is.
    """

    what: Mamba | Delta | Attention | Latent | Mlp | Experts | Plain
    norm: str | None
    reads: str = "stream"
    beside: bool = False
    scale: float = 1.0
    after: str | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A model.

    Attributes:
        embedding, norm: names of the embedding's tensor and of the final norm's.
        epsilon: of all norms outside the mixers.
        embedding_scale, logit_scale: of what is looked up, and of the logits.
        angles: (pairs,) radians a token by which rotary attention turns; None: nothing is turned.
        turned: factor of what is turned.
        centred: weights of norms outside the mixers are stored less one.
    """

    embedding: str
    norm: str
    epsilon: float
    parts: Sequence[Planned]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    angles: Tensor | None = None
    turned: float = 1.0
    centred: bool = False

    def norm_of(self, stored: Tensor) -> Tensor:
        """The weight of a norm outside the mixers, of what is stored."""
        return stored + 1 if self.centred else stored

    @property
    def mixers(self) -> list[Mamba]:
        """In the order of the layers."""
        return [part.what for part in self.parts if isinstance(part.what, Mamba)]
