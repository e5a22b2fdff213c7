"""Hybrids in both engines against stock models: logits, greedy tokens, growing states, rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both, held, native, needs_native, reference
from pico_hybrids import FAMILIES, NEW, VARIANTS, pico_hybrid
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsessm
from sparsessm import kernels
from sparsessm.checkpoint import packed
from sparsessm.checkpoint.encoding import encode
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.stacked import stacked
from sparsessm.runtime import engine as native_engine
from sparsessm.runtime.base import FIELDS, Engine
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.keys import BLOCK, MOST, Keys
from sparsessm.runtime.reference import ReferenceEngine

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
MODELS = [name for name in (*FAMILIES, *VARIANTS) if VARIANTS.get(name, (name,))[0] in FIELDS]
OTHER: dict[str, tuple[str, dict[str, Any]]] = {  # sizes that fit no vector, and groups that are left out
    "heads of 5 channels": (
        "nemotron_h",
        {"head_dim": 5, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 23},
    ),
    "heads of 20 channels": ("nemotron_h", {"head_dim": 20, "num_key_value_heads": 4, "hidden_size": 18}),
    "groups of experts": (
        "nemotron_h",
        {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3},
    ),
    "all experts": ("granitemoehybrid", {"num_experts_per_tok": 4, "intermediate_size": 21}),
    "values of 70 channels": (
        "qwen3_5_text",
        {"linear_value_head_dim": 70, "linear_key_head_dim": 3, "linear_num_value_heads": 6, "head_dim": 10},
    ),
    "one head of values": (
        "qwen3_next",
        {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_conv_kernel_dim": 2},
    ),
    "rows of 70 numbers": (
        "kimi_linear",
        {
            "kv_lora_rank": 70,
            "qk_nope_head_dim": 3,
            "qk_rope_head_dim": 5,
            "v_head_dim": 9,
            "q_lora_rank": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "attention_bias": True,
            "linear_head_dim": 20,
            "linear_num_heads": 3,
            "linear_conv_kernel_dim": 2,
        },
    ),
    "one head of rows": (
        "kimi_linear",
        {
            "kv_lora_rank": 1,
            "qk_nope_head_dim": 1,
            "qk_rope_head_dim": 1,
            "v_head_dim": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "linear_head_dim": 1,
            "linear_num_heads": 1,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "turned linearly": (
        "bamba",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9.0}},
    ),
    "turned by yarn": (
        "falcon_h1",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 100.0,
                "original_max_position_embeddings": 16,
            },
            "max_position_embeddings": 64,
        },
    ),
}
LENGTH = 2 * BLOCK + 9


def model_of(name: str) -> Any:
    family, fields = OTHER.get(name, (name, {}))
    if name in OTHER:  # torch's grouped product, the stock default, takes multiples of 16 bytes alone
        fields = fields | {"experts_implementation": "eager"}
    return pico_hybrid(family, **fields)


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def stock(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None], use_cache=False).logits[0]


def near(found: Tensor, expected: Tensor, bound: float = 2e-5) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < bound


def begun(engine: Engine, tokens: int, rows: int = 1) -> Tensor:
    return engine.keys.room(engine.new_state(rows), tokens)


def stepped(engine: Engine, ids: Tensor, state: Tensor) -> Tensor:
    return torch.cat([engine.step(token[None], [state]) for token in ids])


@pytest.mark.parametrize("name", [*MODELS, *OTHER])
@both
def test_prompts_steps_and_both_are_the_stock_model(make: Callable[[Any], Engine], name: str) -> None:
    """A prompt at once, token by token, and cut where a block of keys ends, one before and one behind."""
    model = model_of(name)
    ids = ids_of(LENGTH)
    expected, engine = stock(model, ids), make(model)
    assert near(engine.prompt(ids, begun(engine, LENGTH)[0], every=True), expected)
    assert near(stepped(engine, ids, begun(engine, LENGTH)[0]), expected)
    for cut in (BLOCK - 1, BLOCK, BLOCK + 1):
        state = begun(engine, cut)[0]
        last = engine.prompt(ids[:cut], state)
        assert near(last, expected[cut - 1])
        state = engine.keys.room(state, LENGTH - cut)
        assert near(stepped(engine, ids[cut : cut + 3], state), expected[cut : cut + 3])
        assert near(engine.prompt(ids[cut + 3 :], state, every=True), expected[cut + 3 :])
        assert engine.keys.tokens(state) == LENGTH


@needs_native
@pytest.mark.parametrize("name", MODELS)
def test_64_greedy_tokens_are_those_of_the_stock_model(name: str) -> None:
    model = model_of(name)
    for level in kernels.LEVELS[1:]:
        kernels.LEVEL = level
        engine = native(model)
        state, chosen, rows = begun(engine, 64)[0], [7], []
        for _ in range(64):
            rows.append(engine.step(torch.tensor(chosen[-1:]), [state])[0])
            chosen.append(int(rows[-1].argmax()))
        expected = stock(model, torch.tensor(chosen[:-1]))
        assert torch.equal(torch.stack(rows).argmax(1), expected.argmax(1)), level
        assert near(torch.stack(rows), expected), level


@needs_native
@pytest.mark.parametrize("name", [*MODELS, "heads of 5 channels", "groups of experts", "rows of 70 numbers"])
def test_rows_of_a_batch_are_alone_whatever_the_threads(name: str) -> None:
    """Rows of different lengths; three and five threads are more than there are heads of keys, or as many."""
    engine = native(model_of(name))
    assert isinstance(engine, NativeEngine)
    rows = [begun(engine, BLOCK + 40)[0] for _ in range(3)]
    for i, row in enumerate(rows):
        engine.prompt(ids_of((1, 30, BLOCK - 1)[i], i), row)
    alone = [row.clone() for row in rows]
    for turn in range(4):
        ids = ids_of(3, turn)
        engine._threads = (1, 2, 3, 5)[turn]
        together = engine.step(ids, rows)
        for i, row in enumerate(alone):
            engine._threads = (1, 5)[turn % 2]
            assert torch.equal(engine.step(ids[i : i + 1], [row])[0], together[i])
            assert torch.equal(row, rows[i])


@needs_native
@pytest.mark.parametrize("name", ["bamba", "jamba", "zamba2-two-blocks", "falcon_h1"])
def test_slabs_of_a_prompt_are_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    ids = ids_of(LENGTH)
    expected, engine = stock(model, ids), native(model)
    for slab in (23, BLOCK, 10):  # the last of 137 tokens are 22, 9 and 7, one by one
        monkeypatch.setattr(native_engine, "SLAB", slab)
        assert near(engine.prompt(ids, begun(engine, LENGTH)[0], every=True), expected)


def encoded(model: Any, int8: bool) -> dict[str, Any]:
    """Every matrix pruned by half and stored as packed, those of experts too."""

    def half(name: str, whole: Tensor) -> PackedTensor:
        return encode(name, torch.where(whole.abs() < whole.abs().median(), 0.0, whole), int8=int8)

    made: dict[str, Any] = {}
    for name, tensor in packed.of(held(model)).tensors.items():
        whole = tensor.decode()
        if ".experts." in name and whole.ndim == 3:
            made[name] = stacked(name, whole, half)
        elif whole.ndim == 2 and "A_log" not in name:
            made[name] = half(name, whole)
        else:
            made[name] = tensor
    return made


@needs_native
@pytest.mark.parametrize(
    "name", [*(name for name in FAMILIES if name in FIELDS), "nemotron_h-latent", "falcon_h1-normed"]
)
def test_packed_weights_work_in_every_matrix(name: str) -> None:
    model = model_of(name)
    ids = ids_of(40)
    # int8 rounds its inputs too; in Kimi Linear more matrices read what others put out
    for int8, bound in ((False, 2e-5), (True, 0.1 if name == "kimi_linear" else 0.05)):
        tensors = encoded(model, int8)
        engine = NativeEngine(model.config, tensors)
        plain = {key: found.decode(torch.float32) for key, found in tensors.items()}
        truth = ReferenceEngine(model.config, plain)
        expected = truth.prompt(ids, begun(truth, 40)[0], every=True)
        read = engine.prompt(ids, begun(engine, 40)[0], every=True)
        assert float((read - expected).norm() / expected.norm()) < bound
        one = stepped(engine, ids, begun(engine, 40)[0])
        assert float((one - expected).norm() / expected.norm()) < bound
        dense = native(model)
        assert engine.nbytes < dense.nbytes and engine.resident < dense.resident


@needs_native
def test_what_layers_share_is_held_once_and_read_by_each() -> None:
    def engine(uses: int) -> Engine:
        kinds = ["linear_attention"] * (3 - uses) + ["hybrid"] * uses
        fields = {"num_hidden_layers": 3, "layers_block_type": kinds}
        return native(pico_hybrid("zamba2", **fields, use_shared_attention_adapter=False))

    one, two, three = (engine(uses) for uses in (1, 2, 3))
    attention, mlp = 4 * 32 * 32 * 3 + 4 * 16 * 32, 4 * (48 * 16 + 16 * 24)
    assert two.nbytes - one.nbytes == three.nbytes - two.nbytes > attention + mlp
    assert two.resident - one.resident == three.resident - two.resident < attention


@both
def test_a_state_says_how_it_grows(make: Callable[[Any], Engine]) -> None:
    """Of Bamba's one attention layer with 2 heads of 4 channels: 64 floats a token and kind."""
    engine = make(model_of("bamba"))
    keys = engine.keys
    assert keys.block == 2 * 2 * 4 * BLOCK and keys.fixed == engine.state_size
    assert sum(map(sum, engine.sections)) == engine.state_size - 1
    state = engine.new_state(2)
    assert state.shape == (2, engine.state_size) and keys.room(state, 0) is state
    wide = keys.room(state, BLOCK + 1)
    assert wide.shape == (2, engine.state_size + 2 * keys.block)
    assert keys.room(wide, 2 * BLOCK) is wide
    row = wide[0].contiguous()
    engine.prompt(ids_of(3), row)
    assert keys.tokens(row) == 3 and len(keys.trimmed(row)) == engine.state_size + keys.block
    full = keys.trimmed(row)
    for read in (lambda: engine.prompt(ids_of(BLOCK), full), lambda: engine.prompt(ids_of(3), state[0])):
        with pytest.raises(ValueError, match="no room for the keys and values of .* token"):
            read()
    with pytest.raises(ValueError, match="no room for the keys and values of"):
        engine.step(ids_of(1), [state[0]])
    assert keys.tokens(full) == 3


def test_a_model_without_attention_does_not_grow() -> None:
    keys, state = Keys(5, 0), torch.zeros(2, 5)
    assert keys.room(state, 1000) is state and keys.tokens(state[0]) == 0
    assert keys.trimmed(state[0]).data_ptr() == state.data_ptr() and not keys.misfit(state[0])
    assert keys.misfit(torch.zeros(4)) == "it has 4 values, this model 5"


def test_rows_grow_by_more_the_longer_they_are() -> None:
    keys = Keys(3, 10)
    state = torch.zeros(3 + 160 * 10)
    state[2] = 160 * BLOCK
    assert keys.room(state, 1).shape == (3 + 180 * 10,)
    state[2] = MOST - 1
    with pytest.raises(ValueError, match=f"a text of {MOST} tokens; allowed: fewer than {MOST}"):
        keys.room(state, 1)


@pytest.mark.parametrize("count", [-1.0, 0.5, float(MOST), 3 * BLOCK + 1.0, float("nan")])
@needs_native
def test_a_state_that_lies_about_its_tokens_is_refused(count: float) -> None:
    engine = native(model_of("bamba"))
    state = begun(engine, 3 * BLOCK)[0]
    state[engine.keys.fixed - 1] = count
    before = state.clone()
    with pytest.raises(ValueError, match="a state (says that it has seen|has no room)"):
        engine.step(ids_of(1), [state])
    if count == count:
        assert engine.keys.misfit(state)
    assert torch.equal(state.nan_to_num(), before.nan_to_num())


def test_a_kind_of_positions_that_depends_on_the_text_is_refused() -> None:
    config = model_of("bamba").config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type is 'dynamic'; supported: default, linear"):
        ReferenceEngine(config, {})


def test_an_activation_that_is_not_known_is_refused() -> None:
    config = model_of("jamba").config
    config.hidden_act = "tanh"
    with pytest.raises(ValueError, match="the activation of an MLP is 'tanh'; supported: silu"):
        ReferenceEngine(config, {})


@pytest.mark.parametrize("name", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_another_activation_behind_the_convolution_of_the_delta_rule_is_refused(name: str) -> None:
    config = model_of(name).config
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; supported: 'silu'"):
        ReferenceEngine(config, {})


def test_latent_attention_whose_heads_share_keys_is_refused() -> None:
    config = model_of("kimi_linear").config
    config.num_key_value_heads = 2
    with pytest.raises(ValueError, match="num_key_value_heads is 2 and num_attention_heads 4; latent atten"):
        ReferenceEngine(config, {})


@both
def test_a_token_of_latent_attention_leaves_one_row(make: Callable[[Any], Engine]) -> None:
    """Of 12 numbers and 2 common channels, where keys and values of its 4 heads would be 4 (8 + 5)."""
    assert make(model_of("kimi_linear")).keys.block == (12 + 2) * BLOCK


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in FIELDS])
def test_a_tensor_that_is_missing_is_named(name: str) -> None:
    model = model_of(name)
    weights = model.state_dict()
    some = [key for key in weights if key.endswith(("o_proj.weight", "A_log", "norm.weight"))]
    del weights[some[-1]]
    with pytest.raises(ValueError, match=f"the weights have no {some[-1]}"):
        ReferenceEngine(model.config, weights)


def test_a_fingerprint_tells_hybrids_apart() -> None:
    plain = reference(model_of("granitemoehybrid")).layout
    assert plain == reference(model_of("granitemoehybrid")).layout
    other = pico_hybrid("granitemoehybrid", attention_multiplier=0.5)
    assert reference(other).layout != plain


@both
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "kimi_linear"])
def test_heads_of_the_delta_rule_that_forget_have_no_state(make: Callable[[Any], Engine], name: str) -> None:
    kimi = name == "kimi_linear"
    model = pico_hybrid(name, **({"linear_num_heads": 4, "linear_head_dim": 7} if kimi else {}))
    whole = make(model).state_size
    with torch.no_grad():
        for layer, heads in ((0, [1, 2]), (2, [0])):
            at = model.model.layers[layer]
            decay = at.self_attn.forget_gate.A_log if kimi else at.linear_attn.A_log
            decay.flatten()[heads] = 38.0
    ids, engine = ids_of(LENGTH), make(model)
    expected = stock(model, ids)
    assert near(engine.prompt(ids, begun(engine, LENGTH)[0], every=True), expected)
    assert near(stepped(engine, ids, begun(engine, LENGTH)[0]), expected)
    assert engine.state_size == whole - (
        3 * (7 * 7 if kimi else 8 * 5) if isinstance(engine, NativeEngine) else 0
    )


@needs_native
@pytest.mark.parametrize("name", ["pydelta", "pyhybrid"])
def test_a_trained_model_says_what_transformers_says(name: str) -> None:
    """512 greedy tokens."""
    folder = Path(sparsessm.__file__).parent / "builtin" / name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine, ids, rows = native(model), list(range(3, 20)), []
    state = begun(engine, len(ids) + 512)[0]
    rows.append(engine.prompt(torch.tensor(ids), state))
    for _ in range(511):
        ids.append(int(rows[-1].argmax()))
        rows.append(engine.step(torch.tensor(ids[-1:]), [state])[0])
    expected, found = stock(model, torch.tensor(ids))[16:], torch.stack(rows)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert near(found, expected)
