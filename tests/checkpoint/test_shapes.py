"""Checkpoints of Mamba-2 in its authors' format, and models whose shapes pruning has changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from directories import TOKENS, assert_written_as_it_came, dtypes, logits, names, stock_logits, write_original
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsessm import checkpoint
from sparsessm.checkpoint import state_spaces
from sparsessm.checkpoint.reading import Checkpoint

Make = Callable[..., PreTrainedModel]
FOUR = transformers.__version__.startswith("4.")


def write(folder: Path, model: PreTrainedModel) -> Checkpoint:
    """A pico model written by transformers, read again."""
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return checkpoint.load(folder)


def write_mamba2(folder: Path, model: PreTrainedModel, **ssm: Any) -> Checkpoint:
    """A pico Mamba-2 as its authors' code would have stored it, read again."""
    config = model.config
    told = {"layer": "Mamba2", "d_state": config.state_size, "headdim": config.head_dim, "chunk_size": 8}
    write_original(folder, model, ssm_cfg=told | {"ngroups": config.n_groups} | ssm)
    pico_tokenizer(60).save_pretrained(folder)
    return checkpoint.load(folder)


def in_place_of(came: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """The checkpoint with a model of other shapes, all else as it came: what structured pruning leaves."""
    return Checkpoint(
        model, came.tokenizer, came.source, came.format, came.stored, came.trained_length, came.files
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------ the original Mamba-2


def authors_logits(folder: Path) -> Tensor:
    """Mamba-2 as `mamba_ssm/modules/mamba2.py` says it, a token at a time, from the files alone."""
    fields, w = config_of(folder), torch.load(folder / "pytorch_model.bin", weights_only=True)
    ssm = fields["ssm_cfg"]
    inner, states, groups = 2 * fields["d_model"], ssm["d_state"], ssm["ngroups"]
    heads = inner // ssm["headdim"]
    low, high = ssm.get("dt_limit", (0.0, float("inf")))

    def norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))
        return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight

    residual = w["backbone.embedding.weight"][TOKENS]
    for layer in range(fields["n_layer"]):
        t = {k.split(f"layers.{layer}.")[1]: v for k, v in w.items() if f"layers.{layer}." in k}
        m = {k.removeprefix("mixer."): v for k, v in t.items()}
        projected = norm(residual, t["norm.weight"]) @ m["in_proj.weight"].T
        z, mixed, dt = projected.split([inner, inner + 2 * groups * states, heads], -1)
        kernel = m["conv1d.weight"][:, 0]
        padded = F.pad(mixed, (0, 0, kernel.shape[1] - 1, 0)).unfold(1, kernel.shape[1], 1)
        mixed = F.silu((padded * kernel).sum(-1) + m["conv1d.bias"])
        x, B, C = mixed.split([inner, groups * states, groups * states], -1)
        x = x.unflatten(-1, (heads, -1))
        B, C = (part.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for part in (B, C))
        dt = F.softplus(dt + m["dt_bias"]).clamp(low, high)
        decay = torch.exp(-dt * torch.exp(m["A_log"]))
        state, out = torch.zeros(*x.shape[::2], x.shape[3], states), []
        for step in range(x.shape[1]):
            push = (dt[:, step, :, None] * x[:, step])[..., None] * B[:, step, :, None]
            state = decay[:, step, :, None, None] * state + push
            out.append((state * C[:, step, :, None]).sum(-1) + m["D"][:, None] * x[:, step])
        y = torch.stack(out, 1).flatten(-2)
        residual = residual + norm(y * F.silu(z), m["norm.weight"], groups) @ m["out_proj.weight"].T
    return norm(residual, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("ssm", [{}, {"dt_limit": [0.01, 0.1]}], ids=["", "limits"])
@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.skipif(FOUR, reason="one norm"))])
def test_the_original_mamba_2_is_what_its_authors_compute(
    tmp_path: Path, groups: int, ssm: dict[str, Any]
) -> None:
    model = pico_mamba2(n_groups=groups)
    for name, parameter in model.named_parameters():  # so that the states reach the logits
        if name.endswith("in_proj.weight"):
            parameter.data *= 8
    came = write_mamba2(tmp_path / "in", model, **ssm)
    assert came.model.config.model_type == "mamba2" and came.format == "state-spaces"
    expected = authors_logits(tmp_path / "in")
    torch.testing.assert_close(
        logits(came.model), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_mamba_2_there_and_back(tmp_path: Path, tied: bool) -> None:
    model = pico_mamba2(tie_word_embeddings=tied, conv_kernel=3, use_bias=True, expand=3, num_heads=6)
    told = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8, "ngroups": 2, "d_ssm": 48}
    told |= {"expand": 3, "d_conv": 3, "bias": True, "A_init_range": [1, 16], "conv_init": None}
    write_original(tmp_path / "in", model, torch.float16, ssm_cfg=told, attn_layer_idx=[], attn_cfg={})
    pico_tokenizer(60).save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    assert came.stored["backbone.layers.1.mixer.A_log"] == torch.float32
    assert came.stored["backbone.layers.1.mixer.dt_bias"] == torch.float16
    checkpoint.save(came, tmp_path / "out")
    assert_written_as_it_came(tmp_path / "in", tmp_path / "out", tied=tied)
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(came.model))


def test_stock_mamba_2_there_and_back(tmp_path: Path) -> None:
    """transformers 5 writes its infinite step limit as an object, which only its own reader undoes."""
    model = pico_mamba2()
    came = write(tmp_path / "in", model)
    assert came.model.config.time_step_limit[1] == float("inf")
    checkpoint.save(came, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "in/config.json").read_bytes()
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))
    came.files.pop("config.json")
    checkpoint.save(came, tmp_path / "made")
    assert config_of(tmp_path / "made")["time_step_limit"] == config_of(tmp_path / "in")["time_step_limit"]
    assert torch.equal(stock_logits(tmp_path / "made"), logits(model))


# ------------------------------------------------------------------------------- changed shapes

STACKED = [
    {"state_size": 5},
    {"intermediate_size": 20},
    {"intermediate_size": 48},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
    {"state_size": 3, "intermediate_size": 7, "num_hidden_layers": 1},
]
HEADED = [
    {"state_size": 4},
    {"num_heads": 2, "expand": 1},
    {"num_heads": 6, "expand": 3},
    {"head_dim": 4, "expand": 1},
    {"num_hidden_layers": 1},
    {"state_size": 4, "num_heads": 2, "expand": 1, "num_hidden_layers": 1},
]
CHANGES = [(make, change) for make in (pico_mamba, pico_falcon_mamba) for change in STACKED]
CHANGES += [(pico_mamba2, change) for change in HEADED]


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_other_shapes_are_said_in_the_stock_config(
    tmp_path: Path, make: Make, change: dict[str, int]
) -> None:
    came = write(tmp_path / "in", make())
    model = make(**change)
    checkpoint.save(in_place_of(came, model), tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "in") | change
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model))
    checkpoint.save(again, tmp_path / "again")  # what says it already stays as it is
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


def test_older_names_of_a_shape_are_said_anew_too(tmp_path: Path) -> None:
    write(tmp_path / "in", pico_mamba())
    older = config_of(tmp_path / "in") | {"n_layer": 2, "d_inner": 32, "d_model": 16, "ssm_cfg": {}}
    (tmp_path / "in/config.json").write_text(json.dumps(older))
    change = {"intermediate_size": 20, "num_hidden_layers": 1}
    came = checkpoint.load(tmp_path / "in")
    assert came.format == "transformers"
    checkpoint.save(in_place_of(came, pico_mamba(**change)), tmp_path / "out")
    assert config_of(tmp_path / "out") == older | change | {"n_layer": 1, "d_inner": 20}


def test_dtypes_of_layers_that_are_gone_or_new(tmp_path: Path) -> None:
    came = write(tmp_path / "in", pico_mamba())
    name = "backbone.layers.{}.mixer.in_proj.weight"
    came.stored |= {name.format(0): torch.bfloat16, name.format(1): torch.float16}
    checkpoint.save(in_place_of(came, pico_mamba(num_hidden_layers=1)), tmp_path / "fewer")
    checkpoint.save(in_place_of(came, pico_mamba(num_hidden_layers=3)), tmp_path / "more")
    fewer, more = dtypes(tmp_path / "fewer"), dtypes(tmp_path / "more")
    assert name.format(1) not in fewer and fewer[name.format(0)] == "BF16"
    assert [more[name.format(i)] for i in range(3)] == ["BF16", "F16", "F32"]
    assert load_file(tmp_path / "more/model.safetensors").keys() == more.keys()


@pytest.mark.parametrize("change", STACKED)
def test_other_shapes_in_the_original_format(tmp_path: Path, change: dict[str, int]) -> None:
    write_original(tmp_path / "in", pico_mamba())
    pico_tokenizer(60).save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    model = pico_mamba(**change)
    checkpoint.save(in_place_of(came, model), tmp_path / "out")
    before, after = config_of(tmp_path / "in"), config_of(tmp_path / "out")
    ssm = dict(before["ssm_cfg"])
    if "state_size" in change:
        ssm["d_state"] = change["state_size"]
    if "intermediate_size" in change:
        ssm["expand"] = after["ssm_cfg"]["expand"]
        assert int(ssm["expand"] * 16) == change["intermediate_size"]  # as the authors' Mamba reads it
    assert after == before | {"ssm_cfg": ssm, "n_layer": change.get("num_hidden_layers", 2)}
    assert list(after) == list(before)
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model))
    checkpoint.save(again, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


@pytest.mark.parametrize("change", HEADED)
def test_other_shapes_of_the_original_mamba_2(tmp_path: Path, change: dict[str, int]) -> None:
    came = write_mamba2(tmp_path / "in", pico_mamba2(), d_ssm=32)
    model = pico_mamba2(**change)
    checkpoint.save(in_place_of(came, model), tmp_path / "out")
    renamed = {"state_size": "d_state", "head_dim": "headdim", "expand": "expand"}
    before, after = config_of(tmp_path / "in"), config_of(tmp_path / "out")
    ssm = before["ssm_cfg"] | {renamed[key]: value for key, value in change.items() if key in renamed}
    ssm["d_ssm"] = model.config.num_heads * model.config.head_dim
    assert after == before | {"ssm_cfg": ssm, "n_layer": change.get("num_hidden_layers", 2)}
    assert all(type(value) is int for key, value in after["ssm_cfg"].items() if key != "layer")
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model))


def test_a_rank_is_said_only_if_it_changed(tmp_path: Path) -> None:
    write_original(tmp_path / "in", pico_mamba())
    pico_tokenizer(60).save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    checkpoint.save(in_place_of(came, pico_mamba(intermediate_size=20)), tmp_path / "narrow")
    assert "dt_rank" not in config_of(tmp_path / "narrow")["ssm_cfg"]
    checkpoint.save(in_place_of(came, pico_mamba(time_step_rank=3)), tmp_path / "ranked")
    assert config_of(tmp_path / "ranked")["ssm_cfg"]["dt_rank"] == 3


def test_every_number_of_channels_has_an_expansion() -> None:
    draw = random.Random(0)
    pairs = [(channels, width) for width in (16, 49, 768, 2560) for channels in range(1, 2 * width + 1)]
    pairs += [(draw.randrange(1, 10**6), draw.randrange(1, 10**5)) for _ in range(20_000)]
    for channels, width in pairs:
        told = json.loads(json.dumps(state_spaces.expansion(channels, width)))
        assert int(told * width) == channels, (channels, width)
    assert state_spaces.expansion(1536, 768) == 2 and type(state_spaces.expansion(1536, 768)) is int
    up = sum(int(channels / width * width) < channels for channels, width in pairs)
    assert up > 100  # the quotient alone would not do


@pytest.mark.parametrize("format", ["transformers", "state-spaces"])
def test_a_config_that_does_not_say_the_shapes(tmp_path: Path, format: str) -> None:
    """A model changed behind its config's back is not written: nothing could read it."""
    if format == "transformers":
        came = write(tmp_path / "in", pico_mamba())
    else:
        write_original(tmp_path / "in", pico_mamba())
        pico_tokenizer(60).save_pretrained(tmp_path / "in")
        came = checkpoint.load(tmp_path / "in")
    changed = pico_mamba(state_size=5)
    changed.config.state_size = 8
    with pytest.raises(
        ValueError, match=r"config\.json cannot describe the shapes of this model: \S+A_log, "
    ):
        checkpoint.save(in_place_of(came, changed), tmp_path / "out")
    wide = pico_mamba(hidden_size=24)
    if format == "state-spaces":  # no pruning changes this, and the file is not told
        with pytest.raises(
            ValueError, match=r"cannot describe the shapes of this model: \S+embeddings\.weight, "
        ):
            checkpoint.save(in_place_of(came, wide), tmp_path / "out")
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize("format", ["transformers", "state-spaces"])
def test_other_shapes_packed_and_unpacked(tmp_path: Path, format: str) -> None:
    if format == "transformers":
        came = write(tmp_path / "in", pico_mamba())
    else:
        write_original(tmp_path / "in", pico_mamba())
        pico_tokenizer(60).save_pretrained(tmp_path / "in")
        came = checkpoint.load(tmp_path / "in")
    model = pico_mamba(intermediate_size=20, state_size=5, num_hidden_layers=1)
    out = checkpoint.save(in_place_of(came, model), tmp_path / "out")
    checkpoint.pack(out, tmp_path / "packed")
    checkpoint.unpack(tmp_path / "packed", tmp_path / "back")
    assert torch.equal(logits(checkpoint.load(tmp_path / "packed").model), logits(model))
    assert (tmp_path / "back/config.json").read_bytes() == (out / "config.json").read_bytes()
    assert torch.equal(logits(checkpoint.load(tmp_path / "back").model), logits(model))
