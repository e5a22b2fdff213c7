"""The adapters against the stock forward: same logits, in one pass and in slabs of time."""

from __future__ import annotations

import pytest
import torch
from pico import pico_mamba
from torch import Tensor
from transcription import normalise, trace
from transformers import GPT2Config, GPT2LMHeadModel

from sparsessm import kernels
from sparsessm.architectures import MODEL_TYPES, adapt

TOKENS = torch.randint(0, 64, (3, 37), generator=torch.Generator().manual_seed(0))


def stock_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


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
    assert_same(adapt(model).logits(TOKENS), stock_logits(model, TOKENS))


def test_removed_entries_compute_what_stock_code_computes() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log[::2] = 38.0
        model.backbone.layers[1].mixer.A_log[:, ::3] = 0.0
    assert_same(adapt(model).logits(TOKENS), stock_logits(model, TOKENS))


@pytest.mark.parametrize("width", [1, 2, 5, 36, 37])
def test_slabs_of_time_equal_one_pass(width: int) -> None:
    architecture = adapt(pico_mamba())
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            state, parts = None, []
            for start in range(0, hidden.shape[1], width):
                out, state = block.forward(hidden[:, start : start + width], state)
                parts.append(out)
            hidden = torch.cat(parts, 1)
    assert_same(hidden, architecture.final(TOKENS))


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


def test_targets() -> None:
    architecture = adapt(pico_mamba(), {"backbone.layers.0.mixer.A_log": torch.bfloat16})
    names = [target.name for target in architecture.targets]
    assert names == [f"backbone.layers.{i}.mixer.A_log" for i in range(2)]
    first, second = architecture.targets
    assert (first.matrix.shape, first.family, first.kind, first.layer) == ((32, 8), "ssm", "A_log", 0)
    assert (first.stored, second.stored) == (torch.bfloat16, torch.float32)
    first.replace(torch.full((32, 8), 1.0009765625))
    assert (first.matrix == 1.0).all(), "values are rounded to what the checkpoint can hold"
    before = first.companions["D"][0].clone()
    first.shift("D", torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(first.companions["D"][0], before + 1)
    assert architecture.states == 8


def test_the_model_is_put_into_evaluation_mode() -> None:
    assert not adapt(pico_mamba().train()).model.training


def test_unknown_model_type_lists_the_supported() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(ValueError, match=f"'gpt2' has no adapter; supported: {', '.join(MODEL_TYPES)}"):
        adapt(model)


def test_another_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        adapt(pico_mamba(hidden_act="gelu"))
