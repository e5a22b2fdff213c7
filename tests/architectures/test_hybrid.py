"""The adapters of the hybrids against the stock forward: the same logits, the same targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from forward import logits_of, states_of
from hybrids import MIXTURES, ROUTERS, Listener, blocks_of, by_kind, hybrid, slabs
from pico_hybrids import FAMILIES, VARIANTS, pico_hybrid
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor, nn

from sparsessm.architectures import adapt
from sparsessm.architectures.experts import is_experts


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_equal_the_stock_forward(name: str) -> None:
    model = pico_hybrid(name)
    assert_same(logits_of(adapt(model), TOKENS), stock_logits(model))


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
        assert_same(logits_of(architecture, TOKENS), stock_logits(architecture.model))


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
    """But routers and the adapters of Zamba2."""
    architecture = hybrid(name)
    model = architecture.model
    wanted: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] in ROUTERS or (
            architecture.tied and isinstance(module, nn.Embedding)
        ):
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
        assert target.matrix.data_ptr() == wanted[target.name].data_ptr()
        vector = target.kind == "A_log" and wanted[target.name].ndim != 2
        assert target.matrix.shape[0] == (wanted[target.name].numel() if vector else len(wanted[target.name]))
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
    head, *others = architecture.tail.targets
    assert architecture.tied == tied and architecture.states == 8
    assert [other.name for other in others] == ([] if tied else ["model.embed_tokens.weight"])
    assert head.name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tail_feeds_the_head(name: str) -> None:
    architecture = hybrid(name)
    inputs: list[Tensor] = []
    head: Any = architecture.model.lm_head
    with head.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        stock_logits(architecture.model)
    tap = Listener()
    final = states_of(architecture, TOKENS)
    with torch.inference_mode():
        out, _ = architecture.tail.forward(final, None, {"lm_head": tap})
    assert out is not None and torch.equal(out, final)
    assert_same(tap.what[0][0], inputs[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_keeps_the_weights_of_before(name: str) -> None:
    architecture = hybrid(name)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        before = [block.forward(hidden)[0] for block in architecture.blocks]
    copies = [block.copy() for block in architecture.blocks]
    for target in architecture.targets:
        if target.family not in ("head", "embedding"):
            target.replace(target.matrix * 0.5)
    with torch.inference_mode():
        for block, copied, want in zip(architecture.blocks, copies, before, strict=True):
            kept, changed = copied.forward(hidden)[0], block.forward(hidden)[0]
            assert kept is not None and want is not None and changed is not None
            assert torch.equal(kept, want) and not torch.equal(changed, want)
            assert [target.name for target in copied.targets] == [target.name for target in block.targets]
