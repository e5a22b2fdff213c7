"""The forms in which checkpoints of the delta rule are published: inside a model for pictures, with layers
for drafting (mtp), with older names of fields. They are read as stock code reads them, and what is not the
language model goes out byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from pico import pico_tokenizer
from pico_hybrids import COMMON, FAMILIES, pico_hybrid
from published import OLDER, WRAPPED
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import sparsessm
from sparsessm import checkpoint, runtime

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
TOKENS = torch.arange(40).reshape(2, 20) % 64


def with_pictures(folder: Path, kind: str, *, tied: bool = False) -> Path:
    """A directory as stock code writes the whole model, with layers for drafting beside it."""
    text = COMMON | FAMILIES[WRAPPED[kind]] | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    held["mtp.fc.weight"] = torch.arange(512.0).reshape(16, 32).bfloat16()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_the_language_model_inside_is_read_and_the_rest_goes_out_as_it_came(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    folder = with_pictures(tmp_path / "in", kind, tied=tied)
    came = checkpoint.load(folder)
    assert came.model.config.model_type == WRAPPED[kind]
    assert torch.equal(logits(came.model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert {name.split(".")[0] for name in came.extra} == {"model", "mtp"}
    checkpoint.save(came, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("pattern", ["unstructured", "structured:block"])
def test_a_pruned_language_model_is_still_inside(pattern: str, tmp_path: Path) -> None:
    folder = with_pictures(tmp_path / "in", "qwen3_5")
    model = sparsessm.load(folder)
    sparsity = 0.5 if pattern == "unstructured" else 1 / 3
    (tmp_path / "text.txt").write_text(" ".join(f"a state {n} is kept" for n in range(400)))
    few = {"data": str(tmp_path / "text.txt"), "samples": 4, "length": 20, "measure": False}
    report = sparsessm.prune(model, pattern=pattern, sparsity=sparsity, **few)
    sparsessm.save(model, tmp_path / "out", report)
    told: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    whole, found = told
    assert not any(found.values()), found
    assert torch.equal(logits(whole), logits(model.model))
    layers = json.loads((tmp_path / "out/config.json").read_text())["text_config"]["num_hidden_layers"]
    assert layers == (3 if pattern == "unstructured" else 2)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    beside = [name for name in before if "language_model" not in name and name != "lm_head.weight"]
    assert len(beside) > 10 and all(torch.equal(before[name], after[name]) for name in beside)


def test_a_packed_directory_has_the_language_model_alone(tmp_path: Path) -> None:
    folder = with_pictures(tmp_path / "in", "qwen3_5", tied=True)
    notes = checkpoint.pack(folder, tmp_path / "packed").notes
    assert any("transformers does not load them: model.visual." in note for note in notes)
    assert json.loads((tmp_path / "packed/config.json").read_text())["model_type"] == "qwen3_5_text"
    want = logits(checkpoint.load(folder).model)
    assert torch.equal(logits(checkpoint.load(tmp_path / "packed").model), want)
    assert len(runtime.load(tmp_path / "packed").generate([5, 9], 3).ids) == 3
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    told: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, found = told
    assert not any(found.values()), found
    assert torch.equal(logits(model), want)


def test_few_bits_are_of_the_language_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_pictures(tmp_path / "in", "qwen3_5")
    (tmp_path / "text.txt").write_text(" ".join(f"a state {n} is kept" for n in range(400)))
    words = "prune in -o out --bits 4 --data text.txt --samples 4 --length 20 --no-eval"
    done = run(*words.split())
    assert "note: not in the file, because transformers does not load them: model.visual." in done.stderr
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert (told["model_type"], told["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])


def test_a_quantised_language_model_inside_is_refused(tmp_path: Path) -> None:
    folder = with_pictures(tmp_path / "in", "qwen3_5")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised"):
        checkpoint.load(folder)


def renamed(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """A config.json with the fields that the published checkpoints have, in place of those of today."""
    fields = dict(config)
    if kind == "qwen3_next":
        del fields["layer_types"]
        rope = fields.pop("rope_parameters")
        return fields | {
            "full_attention_interval": 2,
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": False,
        }
    kinds, dense = fields.pop("layer_types"), fields.pop("mlp_layer_types")
    linear = {
        "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"],
        "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention"],
        "head_dim": fields.pop("linear_head_dim"),
        "num_heads": fields.pop("linear_num_heads"),
        "short_conv_kernel_size": fields.pop("linear_conv_kernel_dim"),
    }
    code = {"AutoConfig": "configuration_kimi.KimiLinearConfig"}
    return fields | {
        "linear_attn_config": linear,
        "first_k_dense_replace": dense.count("dense"),
        "auto_map": code,
        "mla_use_nope": True,
        "moe_layer_freq": 1,
    }


@pytest.mark.parametrize("kind", OLDER)
def test_older_fields_say_the_same(kind: str, tmp_path: Path) -> None:
    model = pico_hybrid(kind)
    model.save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    file = tmp_path / "in/config.json"
    told = renamed(json.loads(file.read_text()), kind)
    file.write_text(json.dumps(told))
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(logits(came.model), logits(model))
    checkpoint.save(came, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == told


def test_latent_attention_with_positions_is_refused(tmp_path: Path) -> None:
    """transformers would leave the field out, and compute another model."""
    pico_hybrid("kimi_linear").save_pretrained(tmp_path / "in")
    file = tmp_path / "in/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mla_use_nope": False}))
    with pytest.raises(ValueError, match=r"config\.json: mla_use_nope is false; allowed: true"):
        checkpoint.load(tmp_path / "in")


def test_a_strange_older_field_is_refused(tmp_path: Path) -> None:
    pico_hybrid("kimi_linear").save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    file = tmp_path / "in/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"linear_attn_config": {"head_dim": {"x": 1}}}))
    with pytest.raises(ValueError, match=r"config\.json: linear_attn_config\.head_dim is"):
        checkpoint.load(tmp_path / "in")
