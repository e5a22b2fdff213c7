"""The mixers of the gated delta rule: Gated DeltaNet (Yang, Kautz & Hatamizadeh, arXiv 2412.06464) as
Qwen3-Next, Qwen3.5 and OLMo-Hybrid have it, and Kimi Delta Attention (arXiv 2510.26692), whose decays differ
by channel.

What the families do alike is in `DeltaKind`: one convolution over queries, keys and values, queries and keys
of length one, the rule (kernels/delta.py), a norm for each head and a gate. They differ in the linear layers
in front, and that is what a subclass says. Letters: H heads with values of P channels, G groups of heads that
share queries and keys of K channels (G = H in Kimi's); the state of a head is (K, P).

`A_log` has an entry for each head, as in Mamba-2, and a removed one makes the head memoryless: with a decay
of zero nothing is left of S, so the rule corrects nothing, S_t = beta_t k_t v_t' and y_t = beta_t (q_t . k_t)
v_t. What that costs is the difference of two outputs, exactly, up to the norm's scale, which is held fixed.
There is no skip weight D that could absorb a part of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures.axes import Axis
from sparsessm.architectures.base import Tap
from sparsessm.architectures.kept import Kept, asking
from sparsessm.architectures.mixer import MixerKind, convolve, feeding, precise, windows
from sparsessm.architectures.target import Target, removed_a_log
from sparsessm.kernels.delta import energies, gated_delta, unit

Fed = Callable[[str, Tensor], bool]


class MixerState(NamedTuple):
    """What a mixer carries from one slab of time to the next."""

    # (W, taps - 1, 2GK + HP), last inputs of the convolution; None where its output is kept (kept.py)
    conv: Tensor | None
    rule: Tensor | None  # (W, H, K, P); None where the slab stopped before the rule
    removed: Tensor | None  # (W, H, K, P): the state of the rule with A = -1, while it is being observed


class Entered(NamedTuple):
    """What the linear layers in front make of a slab."""

    mixed: Tensor  # (W, T, 2GK + HP): queries, keys and values before the convolution
    gate: Tensor  # (W, T, H, P)
    step: Tensor  # (W, T, H) or (W, T, H, K): softplus of it is how much A forgets
    beta: Tensor  # (W, T, H): share of the correction that is written


class Sizes(NamedTuple):
    """G groups of queries and keys, K channels of each, H heads, P channels of a value."""

    groups: int
    keys: int
    heads: int
    channels: int


@dataclass(frozen=True)
class DeltaKind(MixerKind):
    """Mixers of the gated delta rule.

    Attributes:
        inputs: paths of the linear layers in front, in the order of the data. behind: those of them that
            read another one's outputs, not the mixer's inputs. decay: path of A_log.
        norm, out: names of the norm behind the rule and of the last projection.
    """

    inputs: ClassVar[tuple[str, ...]]
    behind: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[str] = "A_log"
    norm: ClassVar[str] = "o_norm"
    out: ClassVar[str] = "o_proj"

    @abstractmethod
    def sizes(self, mixer: Any) -> Sizes:
        """Of a stock mixer."""

    @abstractmethod
    def entering(self, mixer: Any, x: Tensor, fed: Fed) -> Entered | None:
        """The linear layers in front on x (W, T, d_model).

        Args:
            fed: told what each of them is fed, by its own name; says whether to stop, then this is None.
        """

    @final
    def owns(self, module: Any) -> bool:
        """As `MixerKind.owns`."""
        return self.decay in dict(module.named_parameters())

    @final
    def targets(
        self, mixer: Any, prefix: str, layer: int, stored: Mapping[str, torch.dtype]
    ) -> tuple[Target, ...]:
        """As `MixerKind.targets`."""
        found = []
        for path in (*self.inputs, "conv1d", self.decay, self.out):
            kind = path.rpartition(".")[2]
            state = kind == "A_log"
            name = prefix + (path if state else f"{path}.weight")
            owner, parameter = mixer, mixer.get_parameter(name.removeprefix(prefix))
            dtype = stored.get(name, parameter.dtype)
            what: dict[str, Any] = {"depthwise": kind == "conv1d"}
            if path in self.inputs and kind not in self.behind:
                what["reads"] = prefix
            if state:
                what["removed"] = removed_a_log(dtype)
            else:
                owner = mixer.get_submodule(path)
            what["module_class"] = type(owner).__name__
            family = {"A_log": "ssm", "conv1d": "conv1d"}.get(kind, "projections")
            found.append(Target(name, family, kind, layer, parameter, dtype, **what))
        return tuple(found)

    @final
    def axes(self, mixer: Any, prefix: str) -> tuple[Axis, ...]:
        """As `MixerKind.axes`: none yet."""
        return ()

    @final
    def forward(
        self,
        mixer: Any,
        x: Tensor,
        state: MixerState | None,
        taps: Mapping[str, Tap],
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, MixerState | None]:
        """As `MixerKind.forward`."""
        fed, once = feeding(taps, until), asking(kept)
        before, rule_before, removed_before = (None, None, None) if state is None else state
        last = self.inputs[-1].rpartition(".")[2]

        def convolved() -> tuple[Entered | None, Tensor | None]:
            entered, _ = once(last, lambda: (self.entering(mixer, x, fed), None))
            if entered is None:
                return None, None
            if tap := taps.get("conv1d"):
                tap.add(windows(mixer, entered.mixed, before))
            mixed, after = convolve(mixer, entered.mixed, before)
            return entered._replace(mixed=mixed), after

        def ruled() -> tuple[Tensor | None, MixerState | None]:
            entered, conv = once("conv1d", convolved)
            if entered is None or until == "conv1d":
                return None, MixerState(conv, None, None)
            q, k, v = self._read(mixer, entered.mixed)
            forgotten = F.softplus(entered.step.float() if v.dtype != torch.float64 else entered.step)
            rate = -torch.exp(precise(mixer.get_parameter(self.decay))).flatten()  # (H,)
            g = forgotten * rate.view(-1, *[1] * (forgotten.ndim - 3))
            y, rule = gated_delta(q, k, v, g, entered.beta, rule_before)
            removed_state = removed_before
            if tap := taps.get("A_log"):
                gain = self.output_gain(mixer, y, entered.gate)
                inputs = q, k, v, forgotten, entered.beta
                stats, removed_state = statistics(
                    tap.options, inputs, y, gain, g, rule_before, removed_before
                )
                tap.add(stats, self._out(mixer).weight.detach(), (y * gain).flatten(2))
            after = MixerState(conv, rule, removed_state)
            return (None if until == "A_log" else self._gated(mixer, y, entered.gate)), after

        def put_out() -> tuple[Tensor | None, MixerState | None]:
            y, after = once("A_log", ruled)
            if y is None or fed(self.out, y):
                return None, after
            return self._out(mixer)(y), after

        return once(self.out, put_out)

    def _out(self, mixer: Any) -> Any:
        return mixer.get_submodule(self.out)

    def _read(self, mixer: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (W, T, G, K) as they enter the rule and v (W, T, H, P), of the convolution's output."""
        size = self.sizes(mixer)
        share = size.groups * size.keys
        q, k, v = mixed.split([share, share, size.heads * size.channels], dim=-1)
        q, k = (unit(part.unflatten(-1, (size.groups, size.keys))) for part in (q, k))
        return q * size.keys**-0.5, k, v.unflatten(-1, (size.heads, size.channels))

    def _gated(self, mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
        """Norm and gate of the rule's output y (W, T, H, P) -> (W, T, HP), by the stock module."""
        return mixer.get_submodule(self.norm)(y, gate).flatten(2)

    def output_gain(self, mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
        """(W, T, H, P): by how much the last projection's input changes with the rule's output y, the norm's
        scale fixed, as in mamba2.py. The stock module itself says it: it is linear in y but for the scale."""
        norm = mixer.get_submodule(self.norm)
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        ones = torch.ones_like(y)
        return scale * norm(ones, gate) * (1 + norm.variance_epsilon) ** 0.5


@final
@dataclass(frozen=True)
class Qwen35Delta(DeltaKind):
    """Of Qwen3.5: queries, keys and values in one matrix, gate, beta and step in one each."""

    inputs = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    norm, out = "norm", "out_proj"

    def sizes(self, mixer: Any) -> Sizes:
        return _grouped(mixer)

    def entering(self, mixer: Any, x: Tensor, fed: Fed) -> Entered | None:
        if any(fed(kind, x) for kind in self.inputs):
            return None
        gate = mixer.in_proj_z(x).unflatten(-1, (mixer.num_v_heads, mixer.head_v_dim))
        step = mixer.in_proj_a(x) + mixer.dt_bias
        return Entered(mixer.in_proj_qkv(x), gate, step, mixer.in_proj_b(x).sigmoid())


@final
@dataclass(frozen=True)
class Qwen3NextDelta(DeltaKind):
    """Of Qwen3-Next: everything of a group of heads side by side, in two matrices."""

    inputs = ("in_proj_qkvz", "in_proj_ba")
    norm, out = "norm", "out_proj"

    def sizes(self, mixer: Any) -> Sizes:
        return _grouped(mixer)

    def entering(self, mixer: Any, x: Tensor, fed: Fed) -> Entered | None:
        if any(fed(kind, x) for kind in self.inputs):
            return None
        size = self.sizes(mixer)
        many = size.heads // size.groups
        wide = many * size.channels
        both = mixer.in_proj_qkvz(x).unflatten(-1, (size.groups, -1))
        q, k, v, z = both.split([size.keys, size.keys, wide, wide], dim=-1)
        beta, step = mixer.in_proj_ba(x).unflatten(-1, (size.groups, -1)).split([many, many], dim=-1)
        mixed = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
        gate = z.flatten(2).unflatten(-1, (size.heads, size.channels))
        return Entered(mixed, gate, step.flatten(2) + mixer.dt_bias, beta.flatten(2).sigmoid())


@final
@dataclass(frozen=True)
class OlmoDelta(DeltaKind):
    """Of OLMo-Hybrid: a matrix for each; beta may reach 2, which lets the rule turn a state around."""

    inputs = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")

    def sizes(self, mixer: Any) -> Sizes:
        return _grouped(mixer)

    def entering(self, mixer: Any, x: Tensor, fed: Fed) -> Entered | None:
        if any(fed(kind, x) for kind in self.inputs):
            return None
        mixed = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        gate = mixer.g_proj(x).unflatten(-1, (mixer.num_v_heads, mixer.head_v_dim))
        beta = mixer.b_proj(x).sigmoid() * (2.0 if mixer.allow_neg_eigval else 1.0)
        return Entered(mixed, gate, mixer.a_proj(x) + mixer.dt_bias, beta)


@final
@dataclass(frozen=True)
class KimiDelta(DeltaKind):
    """Of Kimi Linear: decays and gate come through a bottleneck, and every channel of a key decays apart."""

    inputs = (
        *("q_proj", "k_proj", "v_proj", "b_proj"),
        *("forget_gate.f_a_proj", "forget_gate.f_b_proj", "g_a_proj", "g_b_proj"),
    )
    behind = ("f_b_proj", "g_b_proj")
    decay = "forget_gate.A_log"

    def sizes(self, mixer: Any) -> Sizes:
        return Sizes(mixer.num_heads, mixer.head_dim, mixer.num_heads, mixer.head_dim)

    def entering(self, mixer: Any, x: Tensor, fed: Fed) -> Entered | None:
        size, forget = self.sizes(mixer), mixer.forget_gate
        if any(fed(kind, x) for kind in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")):
            return None
        if fed("f_b_proj", narrow := forget.f_a_proj(x)):
            return None
        step = (forget.f_b_proj(narrow) + forget.dt_bias).unflatten(-1, (size.heads, size.keys))
        if fed("g_a_proj", x) or fed("g_b_proj", narrow := mixer.g_a_proj(x)):
            return None
        gate = mixer.g_b_proj(narrow).unflatten(-1, (size.heads, size.channels))
        mixed = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        return Entered(mixed, gate, step, mixer.b_proj(x).sigmoid())


def statistics(
    options: Mapping[str, Any],
    inputs: tuple[Tensor, ...],
    y: Tensor,
    gain: Tensor,
    g: Tensor,
    state: Tensor | None,
    removed_state: Tensor | None,
) -> tuple[kernels.ScanStats, Tensor | None]:
    """What the methods for A_log look at, as `mamba2.statistics`.

    Args:
        options: of `kernels.selective_scan_stats`. inputs: q, k, v, softplus of the step, beta.
        y, gain: (W, T, H, P), output of the rule and see `DeltaKind.output_gain`. g: logarithms of decays.

    Returns:
        gram (float64) by channel of all heads, energy and decay (T, H, 1) by head; no cross and no power,
        as nothing could absorb an error.
    """
    q, k, v, forgotten, beta = inputs
    energy = decay = gram = None
    if options.get("energy"):
        energy, decay = _energy(inputs, g, state)
    if options.get("gram"):
        if options.get("removed", "memoryless") == "memoryless":
            meeting = (q * k).sum(-1).repeat_interleave(v.shape[2] // q.shape[2], 2)  # (W, T, H)
            other = (beta * meeting)[..., None] * v
        else:
            other, removed_state = gated_delta(q, k, v, -forgotten, beta, removed_state)
        error = ((y - other) * gain).flatten(2)
        gram = error.square().sum((0, 1)).double()[:, None, None]
        if options["gram"] == "diagonal":
            gram = gram[..., 0]
    return kernels.ScanStats(energy, decay, gram, None, None, removed_state), removed_state


def _energy(inputs: tuple[Tensor, ...], g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, H, 1): energy of a head's states before the update, and decay (its mean over the channels of a
    key), both summed over the windows."""
    _, k, v, _, beta = inputs
    energy, _ = energies(k, v, g, beta, state)
    decay = torch.exp(g)
    decay = decay.mean(-1) if decay.ndim == 4 else decay
    return energy.sum(0)[..., None], decay.sum(0)[..., None]


def _grouped(mixer: Any) -> Sizes:
    """Of a mixer whose heads share queries and keys in groups."""
    return Sizes(mixer.num_k_heads, mixer.head_k_dim, mixer.num_v_heads, mixer.head_v_dim)
