"""What lies beside the weights: what the source had, the result has, or it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from directories import edit, logits
from pico import pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import NEW, pico_hybrid
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sparsessm
from sparsessm import checkpoint, runtime
from sparsessm.checkpoint import companions, files
from sparsessm.checkpoint.folder import Folder

MODULE = "from transformers import {0}\n\n\nclass Mine({0}):\n    pass\n"


def put(folder: Path, *names: str, content: str = "some bytes\n") -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{content}{name}")
    return {name: (folder / name).read_bytes() for name in names}


def saved(folder: Path, out: Path) -> checkpoint.Checkpoint:
    came = checkpoint.load(folder)
    checkpoint.save(came, out, record={"format": 1}, card="a card", force=True)
    return came


def assert_same_tensors(left: Path, right: Path) -> None:
    one, other = (
        {
            name: tensor
            for file in sorted(place.glob("model*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for place in (left, right)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype and torch.equal(other[name], tensor), name


# ----------------------------------------------------------------------------------------------- files

CARRIED = (
    *("LICENSE.md", "NOTICE", "USE_POLICY.md", "vocab.json", "merges.txt", "spiece.model", "qwen.tiktoken"),
    *(
        "tekken.json",
        "chat_template.json",
        "preprocessor_config.json",
        "additional_chat_templates/tool.jinja",
    ),
    *("custom_generate/generate.py", "modeling_mine.py", "results.csv"),
)


def test_small_files_are_carried_over_and_the_result_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    there = put(folder, *CARRIED)
    there |= put(folder, "chat_template.jinja", content="{{ messages[0].content }}")
    out, packed, back = tmp_path / "out", tmp_path / "packed", tmp_path / "back"
    for _ in range(2):  # the second replaces the first
        saved(folder, out)
        checkpoint.pack(out, packed, force=True)
        checkpoint.unpack(packed, back, force=True)
    for place in (out, packed, back):
        assert {name: (place / name).read_bytes() for name in there} == there, place
    record = checkpoint.read_record(out)
    assert record is not None
    assert record["files"] == [
        "USE_POLICY.md",
        "custom_generate/generate.py",
        "modeling_mine.py",
        "results.csv",
    ]
    assert checkpoint.read_record(back) == record
    assert AutoTokenizer.from_pretrained(out).chat_template["default"].startswith("{{ messages")
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"it also has 'mine\.txt'"):
        saved(folder, out)
    (out / "mine.txt").unlink()
    put(out, "custom_generate/mine.py")
    with pytest.raises(ValueError, match=r"it also has 'custom_generate/mine\.py'"):
        saved(folder, out)


def test_what_is_not_carried_over_is_said(folder: Path, tmp_path: Path) -> None:
    put(folder, "pytorch_model.bin", "optimizer.pt", "model.onnx", "onnx/decoder.txt")
    put(folder, ".hidden", "README.md", "__pycache__/a.pyc")
    with open(folder / "large.csv", "wb") as file:
        file.truncate(11 << 20)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    came = saved(folder, tmp_path / "out")
    (note,) = [note for note in came.notes if note.startswith("not carried over")]
    assert note == "not carried over into the result: large.csv, link.txt, model.onnx, onnx/, optimizer.pt"
    assert not {"large.csv", "link.txt", "onnx", ".hidden"} & {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert (tmp_path / "out/README.md").read_text() == "a card"


def test_code_that_files_name_is_carried_over_and_never_run(folder: Path, tmp_path: Path) -> None:
    put(
        folder,
        "inner/layers.py",
        "inner/deep.py",
        "inner/__init__.py",
        "inner/unused.py",
        content="1 / 0\n# ",
    )
    (folder / "inner/layers.py").write_text("from .deep import x\n1 / 0\n")
    (folder / "configuration_mine.py").write_text("1 / 0\nfrom .inner.layers import x\n")
    told = {
        "AutoConfig": "configuration_mine.C",
        "AutoModel": "gone.M",
        "AutoModelForCausalLM": "owner/repo--m.M",
    }
    edit(folder / "config.json", auto_map=told)
    came = saved(folder, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.py")}
    assert {"configuration_mine.py", "inner/layers.py", "inner/deep.py", "inner/__init__.py"} <= found
    assert "auto_map names files that do not exist: gone.py" in came.notes
    assert "not carried over into the result: inner/unused.py" in came.notes


def test_a_result_runs_with_the_code_of_its_source(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_mine.py").write_text("from .parts import *\n" + MODULE.format("MambaForCausalLM"))
    (folder / "parts.py").write_text("")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    saved(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "Mine" and torch.equal(logits(model), logits(pico_mamba()))


def test_a_tokenizer_given_beside_takes_the_place_of_all_its_files(folder: Path, tmp_path: Path) -> None:
    put(
        folder,
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
        "NOTICE",
    )
    pico_tokenizer(48).save_pretrained(tmp_path / "other")
    checkpoint.save(checkpoint.load(folder, tokenizer=tmp_path / "other"), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "NOTICE" in written
    assert not {"vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates"} & written
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 48


# ------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_without_a_vocabulary_file(tmp_path: Path) -> None:
    pico_mamba(vocab_size=400).save_pretrained(tmp_path / "in")
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "extra_ids": 0}
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(config))
    came = saved(tmp_path / "in", tmp_path / "out")
    assert came.tokenizer("ab", add_special_tokens=False)["input_ids"] == [100, 101]
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == config
    assert runtime.load(tmp_path / "out").encode("a", special=False) == [100]


def test_tokens_beyond_the_embedding_matter_only_in_a_text_that_has_them(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>", "<newer>"]})
    tokenizer.save_pretrained(folder)
    came = checkpoint.load(folder)
    assert [n for n in came.notes if "has 66 tokens, the embedding 64 rows" in n]
    text = tmp_path / "text.txt"
    text.write_text("the state forgets the rest " * 60)
    more = {"length": 16, "samples": 4, "method": "magnitude"}
    sparsessm.prune(came, data=str(text), sparsity=0.5, **more, measure=False)
    text.write_text("the state <newer> the rest " * 60)
    with pytest.raises(ValueError, match="tokens 7..65 do not fit the model's vocabulary of 64"):
        sparsessm.evaluate(came, data=str(text), length=16)
    with pytest.raises(ValueError, match="the text has token 65, but the model has only tokens 0 to 63"):
        sparsessm.prune(
            checkpoint.load(folder), data=str(text), sparsity=0.5, **more | {"method": "wanda"}, measure=False
        )
    with pytest.raises(ValueError, match="prompt holds token 65"):
        runtime.of(came).generate("<newer>")


# ---------------------------------------------------------------------------- tensors, backbones, adapters


@pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_that_stock_code_leaves_out_are_carried_over(
    tmp_path: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    pico_hybrid("nemotron_h").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "mtp.layers.0.eh_proj.weight": torch.randn(5, 3).half(),
        "mtp.steps": torch.arange(4),
        "backbone.layers.1.mixer.rotary_emb.inv_freq": torch.tensor([1.0, float("inf")]),
    }
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    if sharded:
        monkeypatch.setattr(files, "SHARD_BYTES", 4000)
    came = saved(folder, tmp_path / "out")
    assert came.extra.keys() == extra.keys()
    assert_same_tensors(folder, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) > 1 or not sharded
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packing = checkpoint.pack(folder, tmp_path / "packed")
    assert [note for note in packing.notes if "not in the file" in note and "mtp.steps" in note]


def bare(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.base_model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("made", [pico_mamba, pico_mamba2])
def test_a_bare_backbone_is_written_back_as_it_came(made: Any, tmp_path: Path) -> None:
    model = made(tie_word_embeddings=True)
    names = bare(model, tmp_path / "in").keys()
    assert "embeddings.weight" in names and not any(
        name.startswith(("backbone", "lm_head")) for name in names
    )
    came = saved(tmp_path / "in", tmp_path / "out")
    assert torch.equal(logits(came.model), logits(model))
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    checkpoint.unpack(tmp_path / "packed", tmp_path / "back")
    assert_same_tensors(tmp_path / "in", tmp_path / "back")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
@pytest.mark.parametrize("kind", ["granitemoehybrid", "zamba2", "jamba"])
def test_a_bare_backbone_of_a_hybrid(kind: str, tmp_path: Path) -> None:
    bare(pico_hybrid(kind, tie_word_embeddings=True), tmp_path / "in")
    saved(tmp_path / "in", tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")


def test_a_bare_backbone_without_its_head_or_a_layer_is_refused(tmp_path: Path) -> None:
    tensors = bare(pico_mamba(tie_word_embeddings=False), tmp_path / "in")
    with pytest.raises(
        ValueError, match=r"a bare backbone without lm_head\.weight, and config\.json does not tie"
    ):
        checkpoint.load(tmp_path / "in")
    edit(tmp_path / "in/config.json", tie_word_embeddings=True)
    save_file({n: t for n, t in tensors.items() if "1.mixer.D" not in n}, tmp_path / "in/model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensors: backbone\.layers\.1\.mixer\.D$"):
        checkpoint.load(tmp_path / "in")


def test_an_adapter_is_named_alone_and_beside_a_model(folder: Path, tmp_path: Path) -> None:
    told = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    alone = tmp_path / "alone"
    for place in (folder, alone):
        place.mkdir(exist_ok=True)
        (place / "adapter_config.json").write_text(json.dumps(told))
        save_file({"x.lora_A.weight": torch.zeros(2, 2)}, place / "adapter_model.safetensors")
    pico_tokenizer().save_pretrained(alone)
    for read in (checkpoint.load, runtime.load, lambda f: checkpoint.pack(f, tmp_path / "out")):
        with pytest.raises(ValueError, match="holds an adapter .* of 'some/base' beside a model, .*merge it"):
            read(folder)
        with pytest.raises(ValueError, match="is an adapter .* of 'some/base', not a model; merge it"):
            read(alone)
    assert checkpoint.load(pico(tmp_path / "dense"), tokenizer=alone).tokenizer  # its tokenizer is one


def pico(folder: Path) -> Path:
    pico_mamba().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer.model"])
def test_a_file_that_git_did_not_fetch_is_named(folder: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 2\n"
    (folder / name).write_text(pointer)
    line = refused("inspect", str(folder))
    assert "git lfs pull" in line and name in line


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("from .parts.mod import A", {"parts/mod.py", "parts/__init__.py"}),
        ("from .parts.mod import *", {"parts/mod.py"}),
        ("from .parts import (\n    one,  # first\n    two as b,\n)", {"parts/one.py", "parts/two.py"}),
        ("    from .parts import one as a, two # x", {"parts/one.py", "parts/two.py"}),
        (f"from .{'a.' * 50}b import c", set()),
        ("from ...up import x", set()),
        ("from parts import x", set()),
    ],
)
def test_code_is_found_by_every_form_of_relative_import(line: str, named: set[str]) -> None:
    found = set(companions._imported("model.py", f"import os\n{line}\n"))
    assert named <= found and (named or not found)


def test_code_of_names_that_no_file_can_have_is_passed_over(folder: Path, tmp_path: Path) -> None:
    put(folder, "model.py", content=f"from .{'a' * 300} import b\n")
    edit(folder / "config.json", auto_map={"AutoModel": f"{'c' * 300}.d.E"})
    assert checkpoint.load(folder).files["model.py"]


@pytest.mark.parametrize("record", ["[]", "null", "{bad", "[" * 5000])
def test_a_damaged_record_is_named_and_nothing_is_written(record: str, folder: Path, tmp_path: Path) -> None:
    checkpoint.pack(folder, tmp_path / "packed")
    (tmp_path / "packed/pruning.json").write_text(record)
    with pytest.raises(ValueError, match="pruning.json"):
        checkpoint.unpack(tmp_path / "packed", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["sparse", "meta", "expanded"])
def test_a_tensor_that_is_no_plain_array_is_named(kind: str, tmp_path: Path) -> None:
    made = {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "meta": lambda: torch.empty(4, 4, device="meta"),
        "expanded": lambda: torch.zeros(1).expand(1 << 40),
    }
    torch.save({"odd": made[kind]()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*odd|plain tensors"):
        list(files.read_tensors(Folder(tmp_path).stock_files))
