"""Checkpoint directories that tests write, in every format, and what is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pico import pico_mamba, pico_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaForCausalLM, PreTrainedModel

NEOX = Path(__file__).parents[2] / "shared/data/tokenizers/gpt-neox-20b/tokenizer.json"
TOKENS = torch.arange(40).reshape(2, 20) % 64
FLOAT32_NAMES = re.compile(r"A_log|\.D$|norm")


def write_stock(folder: Path, dtype: torch.dtype = torch.float32, **overrides: object) -> MambaForCausalLM:
    """A pico model written by transformers itself."""
    model = pico_mamba(**overrides).to(dtype)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return model.float()


def write_mixed(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with A_log, D and norms in float32, at values that `dtype` does not have."""
    write_stock(folder, dtype)
    file = folder / "model.safetensors"
    mixed = {k: v.float() * 1.0001 if FLOAT32_NAMES.search(k) else v for k, v in load_file(file).items()}
    for name in mixed:  # long steps, large B and C: in a fresh model the states hardly reach the logits
        if name.endswith("dt_proj.bias"):
            mixed[name] += 3
        elif name.endswith(("x_proj.weight", "in_proj.weight")):
            mixed[name] *= 8
    save_file(mixed, file, {"format": "pt"})
    return mixed


def assert_written_as_it_came(came: Path, written: Path, *, tied: bool) -> None:
    """Directories of the original format: the same config, tensors, dtypes, and head and embedding as one."""
    assert (written / "config.json").read_bytes() == (came / "config.json").read_bytes()
    before, after = (torch.load(d / "pytorch_model.bin", weights_only=True) for d in (came, written))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
    head, embedding = after["lm_head.weight"], after["backbone.embedding.weight"]
    assert (head.data_ptr() == embedding.data_ptr()) == tied


def write_original(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32, **fields: object
) -> None:
    """The same model as its authors' code would have stored it."""
    config = model.config
    settings = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {"d_state": config.state_size, "layer": "Mamba1"},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": config.tie_word_embeddings,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings | fields))
    renamed = {name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()}
    for name, value in renamed.items():
        if not FLOAT32_NAMES.search(name):
            renamed[name] = value.to(dtype)
    if config.tie_word_embeddings:
        renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]
    torch.save(renamed, folder / "pytorch_model.bin")


def dtypes(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: content.get_slice(name).get_dtype() for name in content.keys()}
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def stock_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def edit(file: Path, **fields: object) -> None:
    """Other fields in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class changed:
    """A JSON file with other fields, as long as the block runs."""

    def __init__(self, file: Path, fields: Any) -> None:
        self.file, self.before = file, file.read_bytes()
        whole = json.loads(self.before) | fields if isinstance(fields, dict) else fields
        file.write_text(json.dumps(whole))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.before)
