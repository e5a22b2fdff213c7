"""The adapters of the hybrids against the stock forward: logits, what each layer is fed, whole runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import planned
import pytest
import torch
from pico import pico_tokenizer
from pico_hybrids import COMMON, FAMILIES, VARIANTS, pico_hybrid
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsessm import checkpoint
from sparsessm.architectures import Block, SharedTarget, Target, adapt, seen_by_all_uses
from sparsessm.architectures.experts import is_experts
from sparsessm.architectures.hybrid import Hybrid
from sparsessm.architectures.hybrid_block import HybridBlock
from sparsessm.calibration import prices
from sparsessm.methods.observers import InputGram, InputNorm
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.studies import trials, windows

TOKENS = torch.randint(0, 64, (3, 37), generator=torch.Generator().manual_seed(0))
MORE_TOKENS = torch.randint(0, 64, (6, 37), generator=torch.Generator().manual_seed(1))
MIXTURES = ("jamba", "nemotron_h", "granitemoehybrid")
ROUTERS = ("router", "gate")


def hybrid(name: str, **overrides: Any) -> Hybrid:
    architecture = adapt(pico_hybrid(name, **overrides))
    assert isinstance(architecture, Hybrid)
    return architecture


def blocks_of(architecture: Hybrid) -> list[HybridBlock]:
    return [block for block in architecture.blocks if isinstance(block, HybridBlock)]


def stock_logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def by_kind(block: Block) -> dict[str, Target]:
    return {target.kind: target for target in block.targets}


class Listener:
    """A tap that keeps all it hears."""

    options: Mapping[str, Any] = {"gram": "full"}

    def __init__(self, kind: str = "", heard: list[str] | None = None) -> None:
        self.kind, self.heard = kind, [] if heard is None else heard
        self.what: list[Any] = []

    def add(self, *what: Any) -> None:
        self.heard.append(self.kind)
        self.what.append(what)
        assert len(what) > 1 or what[0].ndim >= 3  # windows, time, inputs

    @property
    def rows(self) -> Tensor:
        """All inputs of a linear layer, a row a token, window after window."""
        return torch.cat([x.flatten(0, 1) for (x,) in self.what])


def slabs(block: Block, hidden: Tensor, width: int, **how: Any) -> Tensor | None:
    """A block's output, slab after slab; None where it stopped early."""
    state, parts = None, []
    for start in range(0, hidden.shape[1], width):
        out, state = block.forward(hidden[:, start : start + width], state, **how)
        parts.append(out)
    assert all(out is None for out in parts) or all(out is not None for out in parts)
    return None if parts[0] is None else torch.cat(parts, 1)


# --- the same logits ---


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_equal_the_stock_forward(name: str) -> None:
    model = pico_hybrid(name)
    assert_same(adapt(model).logits(TOKENS), stock_logits(model))


@pytest.mark.parametrize("width", [1, 2, 5, 36, 37])
@pytest.mark.parametrize("name", [*FAMILIES, "zamba2-two-blocks", "granite-rope", "jamba-eager"])
def test_slabs_of_time_equal_one_pass(name: str, width: int) -> None:
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            out = slabs(block, hidden, width)
            assert out is not None
            hidden = out
        assert_same(architecture.head(hidden), stock_logits(architecture.model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slab_can_be_run_again_from_the_same_state(name: str) -> None:
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            _, state = block.forward(hidden[:, :20])
            first, second = (block.forward(hidden[:, 20:], state)[0] for _ in range(2))
            assert first is not None and second is not None and torch.equal(first, second)


def test_removed_entries_compute_what_stock_code_computes() -> None:
    for name in FAMILIES:
        architecture = hybrid(name)
        for block in architecture.blocks:
            if (target := by_kind(block).get("A_log")) is not None:
                target.parameter.data.flatten()[::3] = 38.0
        assert_same(architecture.logits(TOKENS), stock_logits(architecture.model))


def test_nothing_of_a_call_stays_in_the_model() -> None:
    for name in FAMILIES:
        architecture = hybrid(name)
        before = stock_logits(architecture.model)
        for block in blocks_of(architecture):
            for target in block.targets:
                with torch.inference_mode():
                    block.forward(architecture.embed(TOKENS), None, {target.kind: Listener()}, target.kind)
        for module in architecture.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert "forward" not in vars(module)
        assert torch.equal(stock_logits(architecture.model), before)


def test_other_code_for_attention_or_activation_is_refused_by_name() -> None:
    model = pico_hybrid("bamba")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention is 'flash_attention_2'; supported: sdpa, eager"):
        adapt(model)
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; supported: 'silu'"):
        adapt(pico_hybrid("bamba", hidden_act="gelu"))


# --- targets ---


ORDERS: Mapping[str, list[list[str]]] = {
    "bamba": [
        ["in_proj", "conv1d", "A_log", "out_proj", "gate_proj", "up_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ],
    "falcon_h1": [
        ["in_proj", "conv1d", "A_log", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
        + ["up_proj", "gate_proj", "down_proj"]
    ],
    "zamba2": [
        ["in_proj", "conv1d", "A_log", "out_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "linear"]
        + ["in_proj", "conv1d", "A_log", "out_proj"],
    ],
    "nemotron_h": [
        ["in_proj", "conv1d", "A_log", "out_proj"],
        [f"experts.{name}.{e}" for e in range(4) for name in ("up_proj", "down_proj")]
        + ["up_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["up_proj", "down_proj"],
    ],
}


@pytest.mark.parametrize("name", ORDERS)
def test_targets_of_the_first_layers(name: str) -> None:
    for block, order in zip(hybrid(name).blocks, ORDERS[name], strict=False):
        assert [target.kind for target in block.targets] == order


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_all_matrices_are_targets_under_their_stored_names(name: str) -> None:
    """But routers, embeddings and the adapters of Zamba2."""
    architecture = hybrid(name)
    model = architecture.model
    wanted: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] in ROUTERS or isinstance(module, nn.Embedding):
            continue
        if "adapter_list" in module_name:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{own}"
            if is_experts(module):
                wanted |= {f"{full}.{e}": part for e, part in enumerate(parameter)}
            elif parameter.ndim > 1 or own == "A_log":
                wanted[full] = parameter
    first = {}  # of tensors with several names
    for full, tensor in wanted.items():
        first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), full)
    if architecture.tied:
        wanted["model.embed_tokens.weight"] = wanted["lm_head.weight"]
        first = {key: full.replace("lm_head", "model.embed_tokens") for key, full in first.items()}
    targets = list(architecture.targets)
    assert sorted(target.name for target in targets) == sorted(first.values())
    stored = model.state_dict()
    for target in targets:
        assert target.parameter.data_ptr() == wanted[target.name].data_ptr()
        assert target.matrix.shape[0] == wanted[target.name].shape[0]
        assert target.name in stored or target.name.rpartition(".")[0] in stored
    for index, block in enumerate((*architecture.blocks, architecture.tail)):
        assert len({target.kind for target in block.targets}) == len(block.targets)
        assert all(target.layer == index for target in block.targets)


def test_a_linear_layer_is_where_its_target_says() -> None:
    for name in FAMILIES:
        architecture = hybrid(name)
        for target in architecture.targets:
            if target.module_class == "Linear" and target.family == "projections":
                assert architecture.model.get_submodule(target.module).weight is target.parameter


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_written_through_its_view(name: str) -> None:
    architecture = hybrid(name)
    experts = [target for target in architecture.targets if target.kind.startswith("experts.")]
    assert len(experts) in (8, 16, 24)
    for target in experts:
        parameter, _, number = target.name.rpartition(".")
        whole = dict(architecture.model.named_parameters())[parameter]
        before, new = whole.detach().clone(), torch.randn_like(target.matrix)
        assert target.matrix.shape == whole.shape[1:] and target.module == target.name
        assert (
            target.module_class
            == type(architecture.model.get_submodule(parameter.rpartition(".")[0])).__name__
        )
        target.replace(new)
        assert torch.equal(whole[int(number)], new) and torch.equal(target.matrix, new)
        others = [e for e in range(len(whole)) if e != int(number)]
        assert torch.equal(whole[others], before[others])


def test_values_of_an_expert_are_rounded_to_what_its_checkpoint_holds() -> None:
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    architecture = adapt(pico_hybrid("jamba"), {name: torch.bfloat16})
    target = by_kind(architecture.blocks[1])["experts.gate_up_proj.2"]
    target.replace(torch.full_like(target.matrix, 1.0009765625))
    assert (target.matrix == 1.0).all() and target.stored == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_head(tied: bool) -> None:
    architecture = hybrid("bamba", tie_word_embeddings=tied)
    [head] = architecture.tail.targets
    assert architecture.tied == tied and architecture.states == 8
    assert head.name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tail_feeds_the_head(name: str) -> None:
    architecture = hybrid(name)
    inputs: list[Tensor] = []
    head: Any = architecture.model.lm_head
    with head.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        stock_logits(architecture.model)
    tap = Listener()
    final = architecture.final(TOKENS)
    with torch.inference_mode():
        out, _ = architecture.tail.forward(final, None, {"lm_head": tap})
    assert out is not None and torch.equal(out, final)
    assert_same(tap.what[0][0], inputs[0])


# --- taps ---


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


def one_sided(name: str) -> Hybrid:
    """A mixture whose first experts get all tokens."""
    architecture = hybrid(name)
    for module_name, module in architecture.model.named_modules():
        if module_name.rpartition(".")[2] in ROUTERS:
            weight: Any = getattr(module, "weight", None)
            if weight is not None and weight.shape == (4, 16):
                with torch.no_grad():
                    weight.zero_()
                if hasattr(module, "e_score_correction_bias"):
                    bias: Any = module.e_score_correction_bias
                    bias.copy_(torch.tensor([3.0, 2.0, 0.0, -1.0]))
    return architecture


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_without_tokens_hears_nothing_and_stops_all_the_same(name: str) -> None:
    architecture = one_sided(name)
    assert_same(architecture.logits(TOKENS), stock_logits(architecture.model))
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


# --- copies ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_keeps_the_weights_of_before(name: str) -> None:
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        before = [block.forward(hidden)[0] for block in architecture.blocks]
    copies = [block.copy() for block in architecture.blocks]
    for target in architecture.targets:
        if target.family != "head":
            target.replace(target.matrix * 0.5)
    with torch.inference_mode():
        for block, copied, want in zip(architecture.blocks, copies, before, strict=True):
            kept, changed = copied.forward(hidden)[0], block.forward(hidden)[0]
            assert kept is not None and want is not None and changed is not None
            assert torch.equal(kept, want) and not torch.equal(changed, want)
            assert [target.name for target in copied.targets] == [target.name for target in block.targets]


# --- the shared blocks of Zamba2 ---


def shared_targets(architecture: Hybrid) -> list[SharedTarget]:
    return [target for target in architecture.targets if isinstance(target, SharedTarget)]


def test_a_shared_matrix_is_one_target_and_says_who_uses_it() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    shared = shared_targets(hybrid("zamba2"))
    assert [(target.kind, target.layer, target.uses) for target in shared] == [
        (kind, 1, (1, 3)) for kind in names
    ]
    two = shared_targets(hybrid("zamba2-two-blocks"))
    assert [target.uses for target in two] == [(1, 3)] * 6 + [(2, 4)] * 6
    assert not shared_targets(hybrid("zamba2-no-adapters"))  # untied words untie these too in stock code
    for name in FAMILIES.keys() - {"zamba2"}:
        assert not shared_targets(hybrid(name))


@pytest.mark.parametrize("name", ["zamba2", "zamba2-two-blocks"])
@pytest.mark.parametrize("width", [7, 37])
def test_all_uses_of_a_shared_matrix_are_seen(name: str, width: int) -> None:
    architecture = hybrid(name)
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for module in architecture.model.modules():
        if isinstance(module, nn.Linear):

            def hook(module: Any, args: Any, key: int = module.weight.data_ptr()) -> None:
                inputs.setdefault(str(key), []).append(args[0].flatten(0, 1).double())

            handles.append(module.register_forward_pre_hook(hook))
    stock_logits(architecture.model)
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        entering = [architecture.embed(TOKENS)]
        for block in architecture.blocks:
            out, _ = block.forward(entering[-1])
            assert out is not None
            entering.append(out)
    for target in shared_targets(architecture):
        hidden = entering[target.uses[0]]
        before = hidden.clone()
        x = inputs[str(target.parameter.data_ptr())]
        assert len(x) == len(target.uses)
        rows = torch.cat(x)
        for observer in (InputGram(), InputGram(paired=True), InputNorm()):
            seen = seen_by_all_uses(architecture, target, observer, hidden, width)
            want = rows.mT @ rows / len(rows)
            assert_same(seen.gram, want.diagonal() if seen.diagonal else want)
            if seen.cross is not None:
                assert_same(seen.cross, want)
        assert torch.equal(hidden, before)


# --- structure ---


def stock_again(model: PreTrainedModel, folder: Path) -> nn.Module:
    """What stock code reads from what stock code writes."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parts_beyond(block: Block, axis: str, size: int) -> dict[tuple[str, int], list[int]]:
    """(tensor, dim) -> the positions there that belong to units from `size` on."""
    gone: dict[tuple[str, int], list[int]] = {}
    for units in (a for a in block.axes if a.name == axis):
        for unit in range(size, units.size):
            for part in units.parts:
                start = part.start + unit * part.width
                gone.setdefault((part.tensor, part.dim), []).extend(range(start, start + part.width))
    return gone


def shrink(architecture: Hybrid, axis: str, size: int) -> dict[str, Any]:
    """Take the units from `size` on out of all layers; returns the fields of the new shape."""
    fields = architecture.fields({axis: size})
    for block in blocks_of(architecture):
        tensors = {key: tensor.clone() for key, tensor in block.layer.state_dict().items()}
        for (name, dim), units in parts_beyond(block, axis, size).items():
            keep = [i for i in range(tensors[name].shape[dim]) if i not in units]
            tensors[name] = tensors[name].index_select(dim, torch.tensor(keep))
        if not block.axes:
            continue
        made = architecture.resize(block, fields, tensors)
        assert made is architecture.blocks[block.index]
        assert {a.size for a in made.axes if a.name == axis} == {size}
        assert [t.name for t in made.targets] == [t.name for t in block.targets]
    return fields


@pytest.mark.parametrize("axis", ["state", "head", "channel"])
@pytest.mark.parametrize("name", [*FAMILIES, "falcon_h1-normed-after", "zamba2-two-blocks", "bamba-biased"])
def test_smaller_mixers_are_stock_models(name: str, axis: str, tmp_path: Path) -> None:
    architecture = hybrid(name)
    if axis not in architecture.structure:
        return
    sizes = architecture.sizes(axis)
    if not sizes:
        with pytest.raises(ValueError, match="takes multiples of hidden_size 16 only"):
            architecture.fields({axis: 1})
        return
    shared = [(target.name, target.uses) for target in shared_targets(architecture)]
    architecture.settle(shrink(architecture, axis, sizes[-1]))
    assert [(target.name, target.uses) for target in shared_targets(architecture)] == shared
    model: Any = architecture.model
    want = stock_logits(model)
    assert_same(architecture.logits(TOKENS), want)
    assert_same(stock_logits(stock_again(model, tmp_path)), want, 1e-6)


# What makes units silent: tensors that write or read them. (A norm over all channels would notice some gone.)
SILENCED: Mapping[str, tuple[str, ...]] = {
    "state": ("in_proj.weight", "in_proj.bias", "conv1d.bias"),
    "head": ("out_proj.weight",),
    "channel": ("out_proj.weight", "x_proj.weight"),
}


@pytest.mark.parametrize(
    ("name", "axis"),
    [("falcon_h1", "head"), ("falcon_h1", "channel"), ("jamba", "channel")]
    + [(name, "state") for name in [*FAMILIES, "bamba-biased"] if name != "jamba"],
)
def test_units_that_do_nothing_can_be_taken_out(name: str, axis: str) -> None:
    """The axes name all places of a unit, and only those: without silent units nothing changes."""
    architecture = hybrid(name)
    size = architecture.sizes(axis)[-1]
    for block in blocks_of(architecture):
        held = block.layer.state_dict()
        for (tensor, dim), units in parts_beyond(block, axis, size).items():
            if tensor.endswith(SILENCED[axis]):
                held[tensor].index_fill_(dim, torch.tensor(units), 0.0)
    want = architecture.logits(TOKENS)
    shrink(architecture, axis, size)
    assert_same(architecture.logits(TOKENS), want)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "jamba"])
def test_a_layer_less_is_a_stock_model(name: str, tmp_path: Path) -> None:
    architecture = hybrid(name)
    model: Any = architecture.model
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks[1:]:
            out, _ = block.forward(hidden)
            assert out is not None
            hidden = out
        want = architecture.head(hidden)
    count = len(architecture.blocks)
    architecture.drop(0)
    assert [block.index for block in architecture.blocks] == list(range(count - 1))
    assert architecture.tail.index == architecture.tail.targets[0].layer == count - 1
    assert_same(architecture.logits(TOKENS), want)
    assert_same(stock_logits(model), want)
    with torch.inference_mode():  # the numbers of the layers count in a cache
        assert_same(model(TOKENS, use_cache=True).logits, want)
    assert_same(stock_logits(stock_again(model, tmp_path)), want, 1e-6)


def test_layers_that_the_configuration_cannot_leave_out_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 cannot be removed: other layers share its transformer"):
        hybrid("zamba2").drop(1)
    jamba = hybrid("jamba")
    assert jamba.structure == ("state", "channel")
    with pytest.raises(
        ValueError, match="layer 0 cannot be removed: stock jamba derives the kind of a layer"
    ):
        jamba.drop(0)
    assert len(jamba.blocks) == 4 and jamba.model.config.num_hidden_layers == 4


# --- whole runs ---

WHOLE: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "magnitude": {"method": "magnitude"},
    "wanda": {"target": "projections", "method": "wanda"},
    "sparsegpt": {"target": "projections", "method": "sparsegpt", "pattern": "2:4"},
    "ssm-fisher": {"target": "ssm", "price": "fisher"},
}


def prune(architecture: Any, recipe: str, **more: Any) -> Any:
    asked = Recipe(**WHOLE[recipe] | more).resolved(model="m", trained_length=37)
    return planned.prune(architecture, asked, MORE_TOKENS)


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_run(name: str, recipe: str) -> None:
    """The pruned model is what stock code computes, and as sparse as was asked for."""
    # 2:4 wants rows of dt_proj that four divides
    architecture = hybrid(name, **({"mamba_dt_rank": 4} if name == "jamba" else {}))
    dense = architecture.logits(TOKENS)
    report = prune(architecture, recipe)
    wanted = {"ssm", "projections"} if recipe in ("default", "magnitude") else {
        "projections" if "projections" in WHOLE[recipe].values() else "ssm"
    }  # fmt: skip
    assert {row.family for row in report.rows} == wanted
    targets = {target.name: target for target in architecture.targets if target.family in wanted}
    assert {row.target for row in report.rows} == targets.keys()
    share = sum(row.pruned for row in report.rows) / sum(row.total for row in report.rows)
    assert share == pytest.approx(0.5, abs=0.01)
    for row in report.rows:
        gone = 0.0 if row.family == "projections" else 38.0
        assert row.pruned == int((targets[row.target].matrix == gone).sum())
    ours = architecture.logits(TOKENS)
    assert_same(ours, stock_logits(architecture.model))
    assert (ours - dense).abs().max() > 1e-4 * dense.abs().max()


@pytest.mark.parametrize("name", [*MIXTURES, "zamba2"])
def test_experts_and_all_uses_have_a_price(name: str) -> None:
    """Mean squared gradient of the loss at each output, by autograd through the stock model."""
    architecture = hybrid(name)
    got = prices.output_fisher(architecture, TOKENS)
    model: Any = architecture.model
    want: dict[str, Tensor] = {}
    owners = {t.parameter.data_ptr(): t.name for t in architecture.targets if t.module_class == "Linear"}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() in owners:

            def keep(module: Any, args: Any, out: Tensor) -> None:
                name = owners[module.weight.data_ptr()]

                def add(grad: Tensor) -> None:
                    want[name] = want.get(name, torch.zeros(())) + grad.flatten(0, -2).double().square().sum(
                        0
                    )

                out.register_hook(add)

            module.register_forward_hook(keep)
    logits = model(TOKENS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for target in architecture.targets:
        if target.module_class == "Linear" and target.family == "projections" and target.kind != "dt_proj":
            assert_same(got[target.name], want[target.name] / TOKENS.numel(), 1e-4)
    for target in architecture.targets:
        if target.kind.startswith("experts."):
            assert got[target.name].shape == (target.matrix.shape[0],) and (got[target.name] > 0).any()


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "default"])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_saw_too_few_tokens_falls_back_to_magnitude(name: str, recipe: str) -> None:
    architecture = one_sided(name)
    inputs = {target.name: target.matrix.shape[1] for target in architecture.targets}
    report = prune(architecture, recipe, **({"ignore": "dt_proj"} if name == "jamba" else {}))
    experts = [row for row in report.rows if "experts." in row.target and row.target[-1].isdigit()]
    few = [row for row in experts if row.tokens is not None and row.tokens < inputs[row.target]]
    assert few and all(row.method == "magnitude" and row.repair == "none" for row in few)
    assert all(row.method != "magnitude" for row in experts if row not in few)
    assert f"{len(few)} of {len(experts)} matrices of experts saw fewer" in report.damped()
    assert few[0].target in report.damped()
    assert {row.tokens for row in report.rows if row not in experts} == {None}
    assert_same(architecture.logits(TOKENS), stock_logits(architecture.model))


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    """The result is a stock model: stock code computes from its files what was measured here."""
    model = pico_hybrid(name)
    made = checkpoint.Checkpoint(model, pico_tokenizer(), "memory", "transformers", {}, None)
    architecture = adapt(model)
    prune(architecture, "magnitude")
    ours = architecture.logits(TOKENS)
    checkpoint.save(made, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), ours)
    came = checkpoint.load(tmp_path / "out")
    assert_same(adapt(came.model, came.stored).logits(TOKENS), ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_that_stock_code_wrote(name: str, tmp_path: Path) -> None:
    model = pico_hybrid(name)
    model.save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    architecture = adapt(came.model, came.stored)
    assert_same(architecture.logits(TOKENS), stock_logits(model))
    prune(architecture, "magnitude")
    checkpoint.save(came, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), architecture.logits(TOKENS))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [(name, f"structured:{axis}") for name in FAMILIES for axis in ("state", "channel")]
    + [(name, "structured:block") for name in FAMILIES if name not in ("jamba", "zamba2")],
)
def test_a_run_that_takes_units_out(name: str, pattern: str, tmp_path: Path) -> None:
    model = pico_hybrid(name)
    made = checkpoint.Checkpoint(model, pico_tokenizer(), "memory", "transformers", {}, None)
    architecture = adapt(model)
    share = 1 / len(architecture.blocks) if pattern == "structured:block" else 0.5
    asked = Recipe(pattern=pattern, sparsity=share).resolved(model="m", trained_length=37)
    report = planned.prune(architecture, asked, MORE_TOKENS)
    assert report.parameters["pruned"] < 0.98 * report.parameters["dense"]
    ours = architecture.logits(TOKENS)
    assert_same(ours, stock_logits(model))
    checkpoint.save(made, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), ours)


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "granitemoehybrid"])
def test_the_last_layer_of_a_kind_stays(name: str) -> None:
    """Stock caches fail without a layer of attention, and there would be no mixer to shrink."""
    architecture = hybrid(name)
    blocks = [block for block in architecture.blocks if isinstance(block, HybridBlock)]
    gone: list[int] = []
    while open_ := architecture.may_go(gone):
        gone.append(open_[0])
    left = [block for block in blocks if block.index not in gone]
    assert 1 <= len(left) <= 2 and any(b.attends for b in left) and any(b.mixer for b in left)
    share = (len(gone) + 1) / len(blocks)
    if len(gone) + 1 < len(blocks):
        asked = Recipe(pattern="structured:block", sparsity=share, method="random")
        with pytest.raises(ValueError, match=f"at most {len(gone)} blocks can be removed"):
            planned.prune(architecture, asked.resolved(model="m", trained_length=37), MORE_TOKENS)


def test_every_family_has_a_config_of_its_name() -> None:
    assert {AutoConfig.for_model(name).model_type for name in FAMILIES} == FAMILIES.keys()
    assert COMMON["vocab_size"] == 64


@pytest.mark.parametrize("name", ["jamba", "zamba2"])
def test_what_looks_at_single_matrices_leaves_out_experts_and_shared_ones(name: str) -> None:
    """`analyze` and `samples: auto` look at matrices that all tokens meet, in one block."""
    architecture = hybrid(name)
    plain = {target.name for target in architecture.targets if target.plain}
    assert plain and plain != {target.name for target in architecture.targets}
    recipe = Recipe(target="projections").resolved(model="m", trained_length=37)
    chosen = assign(recipe, architecture.targets)
    assert {name for name in windows.watched(architecture, chosen)} <= plain
    rules = {name: rule for name, rule in chosen.rules.items() if name in plain}
    rules = {name: replace(rule, repair="self") for name, rule in rules.items()}
    cells = list(trials.measure(architecture, rules, [0.5], MORE_TOKENS, TOKENS, set(), None))
    assert {cell.target for found in cells for cell in found} == rules.keys()
    assert all(cell.kl >= 0 and math.isfinite(cell.kl) for found in cells for cell in found)
