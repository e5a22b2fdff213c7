"""What removing a decay of the delta rule costs, against the rule itself with the decay set to what a removed
entry computes; and that the adapter's state goes from slab to slab."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrids import hybrid
from stock import TOKENS
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures.delta import DeltaKind
from sparsessm.architectures.hybrid_block import HybridBlock
from sparsessm.calibration.prices import row_prices
from sparsessm.kernels import reference
from sparsessm.methods.observers import StateError

NAMES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear")


class Seen:
    """A tap that keeps what it is fed."""

    paired = routed = False

    def __init__(self, **options: Any) -> None:
        self.options, self.parts = options, list[Any]()

    def add(self, *what: Any) -> None:
        self.parts.append(what)


def first_mixer(name: str) -> tuple[HybridBlock, DeltaKind, Any, Tensor]:
    """A block of the delta rule, its kind, its stock mixer and what that is fed, all in float64."""
    architecture = hybrid(name)
    architecture.model.double()
    block = next(block for block in architecture.blocks if block.mixer is not None)
    assert isinstance(block, HybridBlock) and isinstance(architecture.kind, DeltaKind)
    mixer = block.layer.get_submodule(block.mixer or "")
    x = F.rms_norm(
        torch.randn(3, 37, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), (16,)
    )
    return block, architecture.kind, mixer, x


def outputs(kind: DeltaKind, mixer: Any, x: Tensor, removed: str | None) -> tuple[Tensor, Tensor]:
    """The rule's output (W, T, H, P) token by token, and the gate; `removed`: of every head."""
    entered = kind.entering(mixer, x, lambda *_: False)
    assert entered is not None
    taps = mixer.conv1d.weight.shape[-1] - 1
    padded = F.pad(entered.mixed.mT, (taps, 0))
    mixed = F.silu(F.conv1d(padded, mixer.conv1d.weight, groups=padded.shape[1])).mT
    size = kind.sizes(mixer)
    share = size.groups * size.keys
    q, k, v = mixed.split([share, share, size.heads * size.channels], -1)
    q, k = (part.unflatten(-1, (size.groups, size.keys)) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    v = v.unflatten(-1, (size.heads, size.channels))
    forgotten = F.softplus(entered.step)
    A = torch.exp(mixer.get_parameter(kind.decay).detach().double().flatten())
    A = {None: A, "memoryless": torch.full_like(A, 3e16), "unit": torch.ones_like(A)}[removed]
    g = -forgotten * A.view(-1, *[1] * (forgotten.ndim - 3))
    y, _ = reference.gated_delta(q * size.keys**-0.5, k, v, g, entered.beta)
    return y, entered.gate


@pytest.mark.parametrize("removed", ["memoryless", "unit"])
@pytest.mark.parametrize("width", [37, 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_removed_decay_costs_what_the_rule_without_it_changes(name: str, width: int, removed: str) -> None:
    _, kind, mixer, x = first_mixer(name)
    with torch.inference_mode():
        heads = kind.sizes(mixer).heads
        tap, state = StateError(removed, False, rows=heads), None
        for slab in x.split(width, 1):
            _, state = kind.forward(mixer, slab, state, {"A_log": tap}, "A_log")
        found = tap.result()
        (dense, gate), (gone, _) = (outputs(kind, mixer, x, how) for how in (None, removed))
        # the norm's scale of the dense output, times its weight and the gate: what the stock module does to
        # an output of ones, but for that scale
        norm = mixer.get_submodule(kind.norm)
        gated = norm(dense, gate)
        gain = gated / dense
        out = mixer.get_submodule(kind.out).weight
        squares = out.square().sum(0).unflatten(0, (heads, -1))
        cost = (((dense - gone) * gain).square() * squares).sum((0, 1, 3))
        signal = (gated.square() * squares).sum()
    assert found.cross is None and found.power is None  # nothing beside the decay could take a part
    assert torch.allclose(found.gram[:, 0, 0], cost, rtol=1e-6)
    assert found.signal == pytest.approx(float(signal), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_those_of_the_states(name: str) -> None:
    _, kind, mixer, x = first_mixer(name)
    with torch.inference_mode():
        tap, state, steps = Seen(energy=True), None, []
        for slab in x.split(10, 1):
            _, state = kind.forward(mixer, slab, state, {"A_log": tap}, "A_log")
        one, after = Seen(), None
        for t in range(x.shape[1]):
            rule = None if after is None else after.rule
            steps.append(
                torch.zeros(kind.sizes(mixer).heads) if rule is None else rule.square().sum((0, 2, 3))
            )
            _, after = kind.forward(mixer, x[:, t : t + 1], after, {"A_log": one}, "A_log")
    energy = torch.cat([stats.energy for stats, *_ in tap.parts])
    assert energy.shape == (37, kind.sizes(mixer).heads, 1)
    assert torch.allclose(energy[..., 0].double(), torch.stack(steps).double(), rtol=1e-8, atol=1e-12)
    decays = torch.cat([stats.decay for stats, *_ in tap.parts])
    assert decays.min() >= 0 and decays.max() <= x.shape[0]


def test_rows_of_a_fused_projection_are_priced_apart() -> None:
    """Queries and their gates share q_proj; its halves get prices, and so masks and steps, of their own."""
    architecture = hybrid("qwen3_5_text")
    target = next(target for target in architecture.targets if target.kind == "q_proj")
    price = row_prices(architecture, TOKENS)[target.name].unflatten(0, (4, 2, 8))
    queries, gates = price.mean((0, 2))
    assert (price > 0).all() and not 0.5 < queries / gates < 2
