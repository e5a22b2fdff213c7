"""Methods for single entries on FalconMamba and Mamba-2: they run, and look at what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward import logits_of
from pico import pico_falcon_mamba, pico_mamba2
from planned import prune
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import adapt
from sparsessm.architectures.mamba2 import Mamba2Kind
from sparsessm.calibration.walk import walk
from sparsessm.methods import entry_methods
from sparsessm.methods.observers import StateError
from sparsessm.methods.step_observers import StateEnergy
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

MODELS = {"falcon_mamba": pico_falcon_mamba, "mamba2": pico_mamba2}
MORE_TOKENS = torch.randint(0, 64, (8, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "grid" not in row.defaults])
@pytest.mark.parametrize("name", MODELS)
def test_every_method_prunes_the_family(name: str, method: str) -> None:
    architecture = adapt(MODELS[name]())
    dense = logits_of(architecture, TOKENS)
    family = "ssm" if "projections" not in METHODS[method].families else "all"
    asked = Recipe(target=family, method=method).resolved(model="m", trained_length=37)
    report = prune(architecture, asked, MORE_TOKENS)
    targets = {target.name: target for target in architecture.targets}
    assert {row.family for row in report.rows} == ({"ssm"} if family == "ssm" else {"ssm", "projections"})
    for row in report.rows:
        gone = 38.0 if row.family == "ssm" else 0.0
        assert row.pruned == int((targets[row.target].matrix == gone).sum())
    share = sum(row.pruned for row in report.rows) / sum(row.total for row in report.rows)
    assert share == pytest.approx(0.5, abs=0.02)
    ours = logits_of(architecture, TOKENS)
    assert_same(ours, stock_logits(architecture.model, TOKENS))
    assert (ours - dense).abs().max() > 1e-4 * dense.abs().max()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "grid" in row.defaults])
@pytest.mark.parametrize("name", MODELS)
def test_every_method_on_a_grid_rounds_the_family(name: str, method: str) -> None:
    architecture = adapt(MODELS[name]())
    asked = Recipe(method=method).resolved(model="m", trained_length=37)
    report = prune(architecture, asked, MORE_TOKENS)
    targets = {target.name: target for target in architecture.targets if target.family == "projections"}
    assert report.levels.keys() == targets.keys()
    for row in report.rows:
        assert torch.equal(targets[row.target].matrix, report.levels[row.target].levels().values())
        rows, columns = targets[row.target].matrix.shape
        assert (row.pruned, row.bits) == (0, rows * (4 * columns + 16 * -(-columns // 64)))
    assert_same(logits_of(architecture, TOKENS), stock_logits(architecture.model, TOKENS))


@pytest.mark.parametrize("method", ["exact", "sparsessm"])
def test_half_of_the_heads_forget(method: str) -> None:
    model = pico_mamba2()
    asked = Recipe(target="ssm", method=method, allocation="uniform").resolved(model="m", trained_length=37)
    prune(adapt(model), asked, MORE_TOKENS)
    assert [int((layer.mixer.A_log == 38).sum()) for layer in model.backbone.layers] == [2, 2]


def parts(mixer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """u, delta, B, C by head (W, T, H, ...) and the gate z (W, T, D), in float64, by stock modules."""
    heads, groups, states = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
    z, mixed, step = mixer.in_proj(x).split([mixer.intermediate_size, mixer.conv_dim, heads], -1)
    mixed = F.silu(mixer.conv1d(mixed.mT)[..., : x.shape[1]].mT)
    u, B, C = mixed.split([mixer.intermediate_size, groups * states, groups * states], -1)
    B, C = (m.unflatten(-1, (groups, states)).repeat_interleave(heads // groups, 2) for m in (B, C))
    return u.unflatten(-1, (heads, -1)), F.softplus(step + mixer.dt_bias), B, C, z


def recurrence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """C_t h_t (W, T, H, P) and the states before each step (W, T, H, P, N)."""
    h = torch.zeros(*u.shape[:1], *u.shape[2:], B.shape[-1], dtype=u.dtype)
    out, before = [], []
    for t in range(u.shape[1]):
        before.append(h)
        h = torch.exp(delta[:, t] * A)[..., None, None] * h
        h = h + (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        out.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(out, 1), torch.stack(before, 1)


@pytest.mark.parametrize("removed", ["memoryless", "unit"])
@pytest.mark.parametrize("width", [None, 8])
def test_what_a_head_s_memory_is_worth(
    removed: str, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error, its part that D can absorb, and the energy of D's input, against a plain recurrence."""
    if width:
        monkeypatch.setattr("sparsessm.calibration.slabs.LONGEST", width)
    model = pico_mamba2().double()
    architecture, layer = adapt(model), model.backbone.layers[0]
    mixer: Any = layer.mixer
    cost = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        stops = walk(architecture, MORE_TOKENS)
        stop = next(stops)
        hidden = stop.hidden
        seen = stop.look(architecture.blocks[0].targets[2], StateError(removed, False, cost, 4))
        u, delta, B, C, z = parts(mixer, layer.norm(hidden).double())
        A = -torch.exp(mixer.A_log)
        whole, _ = recurrence(u, delta, A, B, C)
        if removed == "unit":
            other, _ = recurrence(u, delta, -torch.ones_like(A), B, C)
        else:
            other = (B * C).sum(-1, keepdim=True) * delta[..., None] * u
        y = (whole + mixer.D[:, None] * u).flatten(2)
        gain = Mamba2Kind().output_gain(mixer, y, z).unflatten(2, (4, -1))
        omega = (cost @ mixer.out_proj.weight.square()).view(4, -1)
        error, passed = (whole - other) * gain, u * gain
        want = [
            (omega * (a * b).sum((0, 1))).sum(-1)
            for a, b in ((error, error), (error, passed), (passed, passed))
        ]
    for got, expected in zip((seen.gram[:, 0, 0], seen.cross[:, 0], seen.power), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_the_gain_is_how_the_norm_passes_a_small_change_on() -> None:
    """With its scale held fixed: what autograd says when the mean square is detached."""
    mixer: Any = pico_mamba2().backbone.layers[0].mixer
    random = torch.Generator().manual_seed(0)
    y, z = (torch.randn(2, 3, mixer.intermediate_size, generator=random) for _ in range(2))
    gated = y * F.silu(z)
    groups = gated.unflatten(-1, (mixer.n_groups, -1))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
    assert_same(Mamba2Kind().output_gain(mixer, y, z) * y, mixer.norm(y, z))
    assert_same(
        (gated.unflatten(-1, (mixer.n_groups, -1)) * scale).flatten(-2) * mixer.norm.weight, mixer.norm(y, z)
    )


def test_energy_of_a_head_s_states() -> None:
    model = pico_mamba2().double()
    architecture, layer = adapt(model), model.backbone.layers[0]
    mixer: Any = layer.mixer
    with torch.inference_mode():
        stops = walk(architecture, MORE_TOKENS)
        stop = next(stops)
        hidden = stop.hidden
        weights = torch.rand(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        got = stop.look(architecture.blocks[0].targets[2], StateEnergy(weights))
        u, delta, B, C, _ = parts(mixer, layer.norm(hidden).double())
        A = -torch.exp(mixer.A_log)
        _, before = recurrence(u, delta, A, B, C)
        decay = torch.exp(delta * A).mean(0)  # (T, H)
        want = (weights[:, None] * decay**2 * before.square().sum((0, 3, 4))).sum(0)
    torch.testing.assert_close(got[:, 0], want, rtol=1e-4, atol=1e-9)
