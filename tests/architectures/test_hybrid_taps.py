"""What taps hear in the hybrids, layer by layer: what the stock forward feeds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward import logits_of
from hybrids import MIXTURES, Listener, blocks_of, hybrid, one_sided, slabs
from pico_hybrids import FAMILIES
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm.architectures.experts import is_experts


def stock_inputs(model: nn.Module) -> dict[str, Tensor]:
    """What every linear layer and expert is fed by the stock forward, by target name; a row a token."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: Any, args: Any, name: str = name) -> None:
                seen[f"{name}.weight"] = args[0].reshape(-1, args[0].shape[-1])

            handles.append(module.register_forward_pre_hook(hook))
        elif is_experts(module):

            def split(module: Any, args: Any, name: str = name) -> None:
                hidden, index, _ = args
                for e in range(module.num_experts):
                    x = hidden[(index == e).any(-1)]
                    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
                    inside = F.linear(x, getattr(module, first)[e])
                    gate, up = inside.chunk(2, -1)
                    inside = module.act_fn(gate) * up if first == "gate_up_proj" else module.act_fn(inside)
                    seen[f"{name}.{first}.{e}"], seen[f"{name}.down_proj.{e}"] = x, inside

            handles.append(module.register_forward_pre_hook(split))
    stock_logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", [*FAMILIES, "nemotron_h-latent", "zamba2-two-blocks", "jamba-eager"])
def test_taps_hear_what_stock_layers_are_fed_in_the_order_of_the_data(name: str) -> None:
    architecture = hybrid(name)
    want = stock_inputs(architecture.model)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            heard: list[str] = []
            kinds = [target.kind for target in block.targets]
            taps = {kind: Listener(kind, heard) for kind in reversed(kinds)}
            plain, _ = block.forward(hidden)
            out, _ = block.forward(hidden, None, taps)
            assert out is not None and plain is not None
            assert_same(out, plain, 2e-6)
            assert heard == [kind for kind in kinds if kind in heard]
            for target in block.targets:
                if target.kind in ("A_log", "conv1d") or target.kind not in heard:
                    continue
                # Jamba's stock code multiplies by dt_proj's weight instead of calling it.
                if target.kind != "dt_proj":
                    assert_same(taps[target.kind].rows, want[target.name])
            silent = [target.name for target in block.targets if target.kind not in heard]
            assert all(not len(want[missed]) for missed in silent)
            hidden = out


@pytest.mark.parametrize("width", [5, 37])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_that_stops_early_fed_the_same(name: str, width: int) -> None:
    """Whatever slabs it came in, and nothing was computed behind it."""
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            kinds = [target.kind for target in block.targets]
            whole = {kind: Listener() for kind in kinds}
            out, _ = block.forward(hidden, None, whole)
            for number, kind in enumerate(kinds):
                heard: list[str] = []
                parts = {other: Listener(other, heard) for other in kinds[number:]}
                assert slabs(block, hidden, width, taps=parts, until=kind) is None
                assert set(heard) <= {kind}
                if kind == "A_log":
                    got = sum(stats.gram for stats, *_ in parts[kind].what)
                    assert isinstance(got, Tensor)
                    assert_same(got, whole[kind].what[0][0].gram)
                elif whole[kind].what:
                    got = torch.cat([x.flatten(0, 1) for (x,) in parts[kind].what])
                    want = whole[kind].rows
                    assert_same(
                        got.mT.flatten(0, -2) @ got if got.ndim < 3 else got.square().sum(0),
                        want.mT.flatten(0, -2) @ want if want.ndim < 3 else want.square().sum(0),
                    )
                else:
                    assert not parts[kind].what
            assert out is not None
            hidden = out


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_without_tokens_hears_nothing_and_stops_all_the_same(name: str) -> None:
    architecture = one_sided(name)
    assert_same(logits_of(architecture, TOKENS), stock_logits(architecture.model))
    quiet = 0
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            kinds = [target.kind for target in block.targets if target.kind.startswith("experts.")]
            whole = {kind: Listener(kind) for kind in kinds}
            block.forward(hidden, None, whole)
            for kind in kinds:
                if not whole[kind].what:
                    quiet += 1
                    assert block.forward(hidden, None, {kind: whole[kind]}, kind)[0] is None
                    assert not whole[kind].what
    assert quiet


class Routed(Listener):
    """A tap that wants to know which tokens an expert was sent."""

    routed = True

    def add(self, *what: Any, rows: Tensor | None = None) -> None:
        super().add(*what, rows)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_tap_that_asks_is_told_which_tokens_an_expert_gets(name: str) -> None:
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in blocks_of(architecture):
            first = next((t.kind for t in block.targets if t.kind.startswith("experts.")), None)
            if first is None:
                hidden = block.forward(hidden)[0]
                assert hidden is not None
                continue
            taps = {first: Routed(), first.replace(first.split(".")[1], "down_proj"): Routed()}
            block.forward(hidden, None, taps)
            (x, rows), (inside, same) = (tap.what[0] for tap in taps.values())
            assert torch.equal(rows, same) and x.shape[1] == inside.shape[1] == len(rows) > 0
            assert rows.max() < TOKENS.numel() and len(set(rows.tolist())) == len(rows)
            return
    raise AssertionError("no experts")


@pytest.mark.parametrize("name", [*FAMILIES, "zamba2-two-blocks", "nemotron_h-latent", "jamba-eager"])
def test_outputs_of_all_layers_can_be_had_for_their_gradients(name: str) -> None:
    """Gradient at the outputs times inputs is the weight's gradient, here against stock code for experts."""
    architecture = hybrid(name)
    hidden = architecture.embed(TOKENS).detach()
    by_name: dict[str, Tensor] = {target.name: target.parameter for target in architecture.targets}
    whole = dict(architecture.model.named_parameters())
    for block in blocks_of(architecture):
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        taps = {kind: Listener(kind) for kind in block._names if kind not in ("A_log", "conv1d")}
        with block.outputs() as outputs:
            out, _ = block.forward(hidden, None, taps)
        assert out is not None
        assert {
            target.name for target in block.targets if target.family == "projections"
        } == outputs.keys() & {target.name for target in block.targets}
        grads = torch.autograd.grad((out * noise).sum(), list(outputs.values()))
        kinds = {full: kind for kind, full in block._names.items()}
        plain, _ = block.forward(hidden)
        assert plain is not None
        for full, grad in zip(outputs, grads, strict=True):
            parameter, _, number = full.rpartition(".")
            of = by_name[full] if full.endswith("weight") else whole[parameter]
            [want] = torch.autograd.grad((plain * noise).sum(), of, retain_graph=True)
            if number != "weight":
                want = want[int(number)]
            if heard := taps[kinds[full]].what:
                x = torch.cat([x.flatten(0, 1) for (x,) in heard])
                assert_same(grad.flatten(0, -2).mT @ x, want, 1e-4)
            else:
                assert not grad.numel() and not want.any()
        hidden = out.detach()
    again = [
        set(block._names.values()) - {t.name for t in block.targets} for block in blocks_of(architecture)
    ]
    assert any(again) == name.startswith("zamba2")  # outputs of what an earlier block has are there too
