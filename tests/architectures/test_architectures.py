"""The adapters against the stock forward: same logits, in one pass and in slabs of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward import logits_of, states_of
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor
from transcription import normalise, trace
from transformers import GPT2Config, GPT2LMHeadModel

from sparsessm import architectures, kernels
from sparsessm.architectures import MODEL_TYPES, Block, Target, adapt


@pytest.mark.parametrize("level", kernels.LEVELS)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"use_bias": True}, {"use_conv_bias": False}, {"state_size": 3, "expand": 3, "conv_kernel": 2},
     {"hidden_size": 24, "time_step_rank": 5, "num_hidden_layers": 1}, {"tie_word_embeddings": False}],
)  # fmt: skip
def test_logits_equal_the_stock_forward(
    level: str, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LEVEL", level)
    model = pico_mamba(**overrides)
    assert_same(logits_of(adapt(model), TOKENS), stock_logits(model, TOKENS))


def test_removed_entries_compute_what_stock_code_computes() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log[::2] = 38.0
        model.backbone.layers[1].mixer.A_log[:, ::3] = 0.0
    assert_same(logits_of(adapt(model), TOKENS), stock_logits(model, TOKENS))


@pytest.mark.parametrize("width", [1, 2, 5, 36, 37])
def test_slabs_of_time_equal_one_pass(width: int) -> None:
    in_slabs_as_in_one_pass(pico_mamba(), width)


def in_slabs_as_in_one_pass(model: torch.nn.Module, width: int) -> None:
    architecture = adapt(model)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            state, parts = None, []
            for start in range(0, hidden.shape[1], width):
                out, state = block.forward(hidden[:, start : start + width], state)
                parts.append(out)
            hidden = torch.cat(parts, 1)
    assert_same(hidden, states_of(architecture, TOKENS))


def test_mixer_equals_the_transcription() -> None:
    """In float64, so that the transcription which other tests rely on is itself tied to the adapter."""
    model = pico_mamba().double()
    architecture = adapt(model)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS[:1])
        out, _ = architecture.blocks[0].forward(hidden)
    block = model.backbone.layers[0]
    want = hidden[0].numpy() + trace(block.mixer, normalise(block.norm, hidden[0].numpy())).out
    assert_same(out[0], torch.from_numpy(want), 1e-7)  # the stock norm computes in float32


ORDER = ["in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj"]


def by_kind(block: Block) -> dict[str, Target]:
    return {target.kind: target for target in block.targets}


def test_targets_are_all_matrices_in_the_order_of_the_data() -> None:
    model = pico_mamba(time_step_rank=3, tie_word_embeddings=False)
    architecture = adapt(model)
    stored = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    targets = list(architecture.targets)
    assert {target.name for target in targets} == stored.keys()
    assert [target.kind for target in targets] == [*ORDER, *ORDER, "lm_head", "embeddings"]
    assert [target.layer for target in targets] == [0] * 6 + [1] * 6 + [2] * 2
    for target in targets:
        assert target.parameter is stored[target.name]
        assert target.matrix.shape == target.parameter.shape[:1] + target.parameter[0].flatten().shape
        module = model.get_submodule(target.name.rpartition(".")[0])
        assert target.module_class == type(module).__name__
        assert target.module == target.name.removesuffix(".weight")
    families = {target.kind: target.family for target in targets}
    assert families == {kind: "projections" for kind in ORDER} | {
        "conv1d": "conv1d", "A_log": "ssm", "lm_head": "head", "embeddings": "embedding",
    }  # fmt: skip
    assert [target.kind for target in targets if target.depthwise] == ["conv1d"] * 2
    first = by_kind(architecture.blocks[0])
    assert first["A_log"].removed == {"memoryless": 38.0, "unit": 0.0}
    assert all(t.removed == {"zero": 0.0} for t in first.values() if t.kind != "A_log")
    assert {kind for kind, target in first.items() if target.companions} == {"A_log"}
    assert first["dt_proj"].fed_by == ("x_proj", 3)
    assert [kind for kind, target in first.items() if target.fed_by] == ["dt_proj"]


def test_dt_proj_is_not_fed_by_x_proj_alone_if_that_has_a_bias() -> None:
    model = pico_mamba()
    mixer = model.backbone.layers[0].mixer
    mixer.x_proj.bias = torch.nn.Parameter(torch.ones(mixer.x_proj.out_features))
    first, second = (by_kind(block)["dt_proj"] for block in adapt(model).blocks)
    assert first.fed_by is None and second.fed_by == ("x_proj", 1)


def test_values_are_rounded_to_what_the_checkpoint_can_hold() -> None:
    prefix = "backbone.layers.0.mixer."
    stored = {f"{prefix}A_log": torch.bfloat16, f"{prefix}conv1d.weight": torch.float16}
    architecture = adapt(pico_mamba(), stored)
    first, second = (by_kind(block) for block in architecture.blocks)
    assert first["A_log"].matrix.shape == (32, 8)
    assert (first["A_log"].stored, first["conv1d"].stored) == (torch.bfloat16, torch.float16)
    assert {target.stored for target in second.values()} == {torch.float32}
    first["A_log"].replace(torch.full((32, 8), 1.0009765625))
    assert (first["A_log"].matrix == 1.0).all()
    new = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    first["conv1d"].replace(new)
    assert torch.equal(first["conv1d"].parameter[:, 0], new.half().float())
    before = first["A_log"].companions["D"][0].clone()
    first["A_log"].shift("D", torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(first["A_log"].companions["D"][0], before + 1)
    assert architecture.states == 8


def test_a_tied_weight_is_one_target_under_the_name_it_is_stored_by() -> None:
    model = pico_mamba()
    assert model.lm_head.weight is model.backbone.embeddings.weight
    for stored, name in [
        ({}, "backbone.embeddings.weight"),
        ({"backbone.embeddings.weight": torch.float16}, "backbone.embeddings.weight"),
        ({"lm_head.weight": torch.float16}, "lm_head.weight"),
        (dict.fromkeys(["backbone.embeddings.weight", "lm_head.weight"], torch.float16), "lm_head.weight"),
    ]:
        architecture = adapt(model, stored)
        heads = [target for target in architecture.targets if target.family == "head"]
        assert [(head.name, head.kind, head.layer) for head in heads] == [(name, "lm_head", 2)]
        assert heads[0].stored == stored.get(name, torch.float32)
        assert heads[0].parameter is model.lm_head.weight and architecture.tied
    heads[0].replace(torch.ones(64, 16))
    assert (model.backbone.embeddings.weight == 1).all() and (model.lm_head.weight == 1).all()


def test_a_head_of_its_own() -> None:
    model = pico_mamba(tie_word_embeddings=False)
    architecture = adapt(model)
    head = architecture.tail.targets[0]
    assert (head.name, architecture.tied) == ("lm_head.weight", False)
    before = model.backbone.embeddings.weight.clone()
    head.replace(torch.ones(64, 16))
    assert (model.lm_head.weight == 1).all() and torch.equal(model.backbone.embeddings.weight, before)


class Listener:
    """A tap that keeps all it hears."""

    paired = routed = False

    def __init__(self, kind: str, heard: list[str], **options: Any) -> None:
        self.kind, self.heard, self.options = kind, heard, options
        self.what: list[Any] = []

    def add(self, *what: Any) -> None:
        self.heard.append(self.kind)
        self.what.append(what)


def test_taps_are_fed_in_the_order_of_the_data() -> None:
    model = pico_mamba(time_step_rank=3)
    architecture = adapt(model)
    heard: list[str] = []
    taps = {kind: Listener(kind, heard) for kind in reversed(ORDER)}
    taps["A_log"].options = {"energy": True}
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        out, _ = architecture.blocks[0].forward(hidden, None, taps)
        plain, _ = architecture.blocks[0].forward(hidden)
    assert heard == ORDER
    assert out is not None and plain is not None
    assert_same(out, plain, 1e-6)
    [(stats, weight, y)] = taps["A_log"].what
    assert stats.energy.shape == (37, 32, 8) and y.shape == (3, 37, 32)
    assert torch.equal(weight, model.backbone.layers[0].mixer.out_proj.weight) and not weight.requires_grad
    shapes = [tuple(taps[kind].what[0][0].shape[2:]) for kind in ORDER if kind != "A_log"]
    assert shapes == [(16,), (32, 4), (32,), (3,), (32,)]


@pytest.mark.parametrize("until", ORDER)
@pytest.mark.parametrize("width", [5, 37])
def test_a_forward_that_stops_early_fed_the_same(until: str, width: int) -> None:
    """Whatever slabs it came in, and nothing was computed behind it."""
    architecture = adapt(pico_mamba(use_bias=True, time_step_rank=3))
    block, options = architecture.blocks[0], {"gram": "full", "removed": "unit"}
    heard: list[str] = []
    whole, parts = ({until: Listener(until, heard, **options)} for _ in range(2))
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        block.forward(hidden, None, whole)
        for kind in ORDER[ORDER.index(until) + 1 :]:
            parts[kind] = Listener(kind, heard, **options)
        state = None
        for start in range(0, 37, width):
            out, state = block.forward(hidden[:, start : start + width], state, parts, until)
            assert out is None
    assert set(heard) == {until}
    want, got = whole[until].what[0], parts[until].what
    if until == "A_log":
        assert_same(sum(part[0].gram for part in got), want[0].gram)
        want, got = want[2:], [part[2:] for part in got]
    assert_same(torch.cat([part[0] for part in got], 1), want[0])


def test_a_copy_keeps_the_weights_of_before() -> None:
    architecture = adapt(pico_mamba())
    block = architecture.blocks[0]
    copied = block.copy()
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        before, _ = block.forward(hidden)
        for target in block.targets:
            target.replace(target.matrix * 0.5)
        by_kind(block)["A_log"].shift("D", torch.ones(32))
        after, _ = block.forward(hidden)
        kept, _ = copied.forward(hidden)
    assert before is not None and after is not None and kept is not None
    assert torch.equal(kept, before) and not torch.equal(after, before)
    assert [target.name for target in copied.targets] == [target.name for target in block.targets]
    assert torch.equal(by_kind(copied)["in_proj"].matrix, 2 * by_kind(block)["in_proj"].matrix)


def test_the_tail_feeds_the_head_and_passes_everything_on() -> None:
    model = pico_mamba()
    architecture = adapt(model)
    inputs: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    stock_logits(model, TOKENS)
    final = states_of(architecture, TOKENS)
    tap = Listener("lm_head", [])
    with torch.inference_mode():
        out, _ = architecture.tail.forward(final, None, {"lm_head": tap})
    assert out is not None and torch.equal(out, final)
    assert_same(tap.what[0][0], inputs[0])


def test_the_model_is_put_into_evaluation_mode() -> None:
    assert not adapt(pico_mamba().train()).model.training


def test_unknown_model_type_lists_the_supported() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    known = ", ".join(sorted(MODEL_TYPES))
    with pytest.raises(ValueError, match=f"'gpt2' has no adapter; supported: {known}"):
        adapt(model)


def test_another_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        adapt(pico_mamba(hidden_act="gelu"))


FAMILY = {
    "falcon": lambda **more: pico_falcon_mamba(**more),
    "falcon, biased": lambda **more: pico_falcon_mamba(use_bias=True, state_size=3, conv_kernel=2, **more),
    "mamba2": lambda **more: pico_mamba2(**more),
    "mamba2, one group": lambda **more: pico_mamba2(n_groups=1, use_bias=True, **more),
    "mamba2, odd sizes": lambda **more: pico_mamba2(
        hidden_size=15, num_heads=6, head_dim=5, state_size=3, n_groups=3, conv_kernel=3, **more
    ),
    "mamba2, limited steps": lambda **more: pico_mamba2(
        time_step_limit=(0.01, 0.4), use_conv_bias=False, **more
    ),
}


@pytest.mark.parametrize("level", kernels.LEVELS)
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_computes_what_stock_code_computes(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LEVEL", level)
    model = FAMILY[name]()
    assert_same(logits_of(adapt(model), TOKENS), stock_logits(model, TOKENS))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("width", [1, 5, 36])
def test_the_family_in_slabs_of_time(name: str, width: int) -> None:
    in_slabs_as_in_one_pass(FAMILY[name](), width)


def test_memoryless_heads_of_mamba2_compute_what_stock_code_computes() -> None:
    model = FAMILY["mamba2"]()
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log[::2] = 38.0
        model.backbone.layers[1].mixer.A_log[1] = 0.0
    assert_same(logits_of(adapt(model), TOKENS), stock_logits(model, TOKENS))


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_shows_all_its_matrices(name: str) -> None:
    """Every matrix is a target, and a linear one is fed what its module is fed."""
    model = FAMILY[name](tie_word_embeddings=False)
    architecture = adapt(model)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1 or n.endswith("A_log")}
    assert {target.name for target in architecture.targets} == matrices.keys()
    for block in architecture.blocks:
        heard: list[str] = []
        kinds = [target.kind for target in block.targets]
        fed = {kind: Listener(kind, heard, gram="full") for kind in kinds}
        # the stock FalconMamba multiplies by dt_proj's weight without calling the module
        linear = [t for t in block.targets if t.module_class == "Linear" and t.kind != "dt_proj"]
        inputs = _entering(model, {t.kind: t.module for t in linear} | {"": block.name})
        with torch.inference_mode():
            block.forward(inputs[""], None, fed)
        assert heard == kinds
        for target in linear:
            assert_same(fed[target.kind].what[0][0], inputs[target.kind])


def _entering(model: Any, modules: dict[str, str]) -> dict[str, Tensor]:
    """What the stock model feeds into modules, by the keys they are given under."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, key=key: seen.setdefault(key, args[0])
        )
        for key, name in modules.items()
    ]
    stock_logits(model, TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


def test_an_older_transformers_is_refused_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures.transformers, "__version__", "4.57.1")
    with pytest.raises(ValueError, match="'bamba' needs transformers 5 or newer; installed: 4.57.1"):
        adapt(pico_hybrid("bamba"))
    for model in (pico_mamba(), pico_falcon_mamba(), pico_mamba2(n_groups=1)):
        adapt(model)
    with pytest.raises(ValueError, match="n_groups is 2: transformers before 5 normalises all groups"):
        adapt(pico_mamba2(n_groups=2))


def test_norms_that_are_a_function_are_there_all_the_same() -> None:
    """FalconMamba before transformers 5: no modules, an epsilon."""
    model = pico_falcon_mamba()
    want = stock_logits(model, TOKENS)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        mixer.rms_eps = model.config.mixer_rms_eps
        del mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm
    architecture = adapt(model)
    assert_same(logits_of(architecture, TOKENS), want)
    (states,) = [axis for axis in architecture.blocks[0].axes if axis.name == "state"]
    assert states.read is None and states.write is None
