"""Checkpoints: every format there and back, and stock code on the result (refusals have their own file)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from command import new_python, python
from directories import (
    FLOAT32_NAMES,
    NEOX,
    TOKENS,
    assert_written_as_it_came,
    dtypes,
    logits,
    names,
    stock_logits,
    write_mixed,
    write_original,
    write_stock,
)
from forward import logits_of
from pico import TEXT, pico_mamba, pico_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, MambaForCausalLM

import sparsessm
from sparsessm import checkpoint
from sparsessm.architectures import REMOVED_A_LOG, adapt
from sparsessm.checkpoint import files

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
ORIGINAL_EMBEDDING = "backbone.embedding.weight"


def test_stock_there_and_back(tmp_path: Path) -> None:
    model = write_stock(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    assert came.format == "transformers" and came.trained_length is None
    assert not came.model.training and came.model.dtype == torch.float32
    assert torch.equal(logits(came.model), logits(model))
    assert checkpoint.save(came, tmp_path / "out") == tmp_path / "out"
    assert names(tmp_path / "out") == names(tmp_path / "in")
    for name in names(tmp_path / "in") - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    assert names(tmp_path) == {"in", "out"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # one reader, all files
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("the state").input_ids == pico_tokenizer()("the state").input_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_tensor_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    mixed = write_mixed(tmp_path / "in", dtype)
    came = checkpoint.load(tmp_path / "in")
    assert came.stored == {name: value.dtype for name, value in mixed.items()}
    checkpoint.save(came, tmp_path / "out")
    assert dtypes(tmp_path / "out") == dtypes(tmp_path / "in")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in mixed.items())
    assert torch.equal(stock_logits(tmp_path / "out"), logits(came.model))


def test_the_loaded_model_owns_its_memory(tmp_path: Path) -> None:
    model = write_stock(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    with open(file, "r+b") as content:
        content.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(came.model), logits(model))


def test_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_stock(tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    assert (tmp_path / "in/model.safetensors.index.json").exists()
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(logits(came.model), logits(model))
    monkeypatch.setattr(files, "SHARD_BYTES", 5000)
    checkpoint.save(came, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(value.nbytes for value in load_file(shard).values()) for shard in shards]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert max(sizes) <= 5000 and sum(sizes) == index["metadata"]["total_size"]
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))
    assert torch.equal(logits(checkpoint.load(tmp_path / "out").model), logits(model))


def test_a_bin_of_transformers(tmp_path: Path) -> None:
    model = write_stock(tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "in/pytorch_model.bin")
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(logits(came.model), logits(model))
    checkpoint.save(came, tmp_path / "out")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))


def test_shards_of_bin(tmp_path: Path) -> None:
    model = write_stock(tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    tensors = list(model.state_dict().items())
    weight_map = {}
    for number, part in enumerate((tensors[:9], tensors[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(dict(part), tmp_path / "in" / file)
        weight_map |= {name: file for name, _ in part}
    (tmp_path / "in/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(checkpoint.load(tmp_path / "in").model), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_untied_and_tied_heads(tmp_path: Path, tied: bool) -> None:
    model = write_stock(tmp_path / "in", tie_word_embeddings=tied)
    came = checkpoint.load(tmp_path / "in")
    checkpoint.save(came, tmp_path / "out")
    assert ("lm_head.weight" in dtypes(tmp_path / "out")) != tied
    assert dtypes(tmp_path / "out") == dtypes(tmp_path / "in")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))


def write_named(folder: Path, form: str, stored_names: list[str]) -> MambaForCausalLM:
    """A tied pico model whose one embedding is stored under these names."""
    model = write_stock(folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop(EMBEDDING)
    tensors |= {name: embedding.clone() for name in stored_names}
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "stored_names",
    [[EMBEDDING], [HEAD], [EMBEDDING, HEAD], [ORIGINAL_EMBEDDING, HEAD], [ORIGINAL_EMBEDDING, EMBEDDING]],
    ids=" ".join,
)
def test_a_tied_pair_under_any_of_its_names(tmp_path: Path, form: str, stored_names: list[str]) -> None:
    model = write_named(tmp_path / "in", form, stored_names)
    came = checkpoint.load(tmp_path / "in")
    assert EMBEDDING in came.stored and not {HEAD, ORIGINAL_EMBEDDING} & came.stored.keys()
    assert came.model.lm_head.weight is came.model.backbone.embeddings.weight
    assert torch.equal(logits(came.model), logits(model))
    if EMBEDDING in stored_names or not transformers.__version__.startswith("4."):  # 4 loses a lone head
        assert torch.equal(logits(came.model), stock_logits(tmp_path / "in"))
    checkpoint.save(came, tmp_path / "out")
    model.save_pretrained(tmp_path / "stock")
    assert dtypes(tmp_path / "out") == dtypes(tmp_path / "stock")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_original_name_of_the_embedding(tmp_path: Path, form: str, tied: bool) -> None:
    """Stock `load_state_dict` maps this name, by MambaModel's hook; `from_pretrained` may leave it random."""
    model = write_stock(tmp_path / "in", tie_word_embeddings=tied)
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[ORIGINAL_EMBEDDING] = tensors.pop(EMBEDDING)
    if form == "bin":
        (tmp_path / "in/model.safetensors").unlink()
        torch.save(tensors, tmp_path / "in/pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    stock = MambaForCausalLM(model.config).eval()
    stock.load_state_dict(tensors, strict=False)
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(logits(came.model), logits(stock)) and torch.equal(logits(stock), logits(model))
    checkpoint.save(came, tmp_path / "out")
    assert EMBEDDING in dtypes(tmp_path / "out") and ORIGINAL_EMBEDDING not in dtypes(tmp_path / "out")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(model))


@pytest.mark.parametrize("missing", [HEAD, ORIGINAL_EMBEDDING])
def test_an_original_with_one_name_of_a_tied_pair(tmp_path: Path, missing: str) -> None:
    model = pico_mamba()
    write_original(tmp_path / "in", model)
    file = tmp_path / "in/pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors[missing]
    torch.save(tensors, file)
    pico_tokenizer().save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(logits(came.model), logits(model))
    checkpoint.save(came, tmp_path / "out")
    written = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert written.keys() == tensors.keys() | {missing}


@pytest.mark.parametrize("tied", [True, False])
def test_original_there_and_back(tmp_path: Path, tied: bool) -> None:
    model = pico_mamba(tie_word_embeddings=tied, expand=3, conv_kernel=3, time_step_rank=2, use_bias=True)
    write_original(
        tmp_path / "in",
        model,
        torch.float16,
        ssm_cfg={"d_state": 8, "expand": 3, "d_conv": 3, "dt_rank": 2, "bias": True},
    )
    words = tmp_path / "tokenizer.json"
    pico_tokenizer(60).backend_tokenizer.save(str(words))
    came = checkpoint.load(tmp_path / "in", tokenizer=words)
    assert came.format == "state-spaces" and came.tokenizer.eos_token == "<|endoftext|>"
    assert came.stored["backbone.layers.0.mixer.A_log"] == torch.float32
    assert came.stored["backbone.embeddings.weight"] == torch.float16
    halved = {k: v if FLOAT32_NAMES.search(k) else v.half().float() for k, v in model.state_dict().items()}
    model.load_state_dict(halved)
    assert torch.equal(logits(came.model), logits(model))
    checkpoint.save(came, tmp_path / "out")
    assert_written_as_it_came(tmp_path / "in", tmp_path / "out", tied=tied)
    again = checkpoint.load(tmp_path / "out")  # brings its tokenizer now
    assert torch.equal(logits(again.model), logits(model))
    assert again.tokenizer("the state").input_ids == pico_tokenizer(60)("the state").input_ids


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared/data")
def test_original_with_its_real_vocabulary(tmp_path: Path) -> None:
    model = pico_mamba(vocab_size=50280)
    write_original(tmp_path / "in", model, vocab_size=50277)
    came = checkpoint.load(tmp_path / "in", tokenizer=NEOX)
    assert came.tokenizer("Hello world").input_ids == [12092, 1533]
    assert came.model.config.vocab_size == 50280 and came.tokenizer.eos_token_id == 0


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    pico_tokenizer(50).save_pretrained(tmp_path / "words")
    came = checkpoint.load(tmp_path / "in", tokenizer=tmp_path / "words")
    assert len(came.tokenizer) == 50 and came.tokenizer_source == str(tmp_path / "words")
    assert checkpoint.load(tmp_path / "in").tokenizer_source is None
    checkpoint.save(came, tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 50


def test_a_trained_length(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    words = pico_tokenizer()
    words.model_max_length = 512
    words.save_pretrained(tmp_path / "in")
    assert checkpoint.load(tmp_path / "in").trained_length == 512


def test_a_model_made_in_memory(tmp_path: Path) -> None:
    model = pico_mamba()
    stored = {name: torch.bfloat16 for name in model.state_dict() if not FLOAT32_NAMES.search(name)}
    made = checkpoint.Checkpoint(model, pico_tokenizer(), "memory", "transformers", stored, None)
    checkpoint.save(made, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["MambaForCausalLM"]
    assert config["model_type"] == "mamba" and (tmp_path / "out/generation_config.json").exists()
    words = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert dtypes(tmp_path / "out")["backbone.layers.0.mixer.in_proj.weight"] == "BF16"
    assert checkpoint.load(tmp_path / "out").stored["backbone.layers.0.mixer.A_log"] == torch.float32
    assert stock_logits(tmp_path / "out").shape == (2, 20, 64)


def test_only_a_changed_config_is_rewritten(tmp_path: Path) -> None:
    write_stock(tmp_path / "in", torch.bfloat16)
    came = checkpoint.load(tmp_path / "in")
    came.model.config.use_cache = False
    checkpoint.save(came, tmp_path / "out")
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out"))
    assert after == before | {"use_cache": False}


def test_record_and_card(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    checkpoint.save(came, tmp_path / "out", record={"format": 1, "name": "π"}, card="# π\n")
    assert checkpoint.read_record(tmp_path / "out") == {"format": 1, "name": "π"}
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == "# π\n"
    assert checkpoint.read_record(tmp_path / "in") is None
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "in/config.json").read_bytes()
    with pytest.raises(ValueError, match=r"no such directory: '\./nowhere'"):
        checkpoint.read_record("./nowhere")
    with pytest.raises(ValueError, match="pruning.json cannot hold this record"):
        checkpoint.save(came, tmp_path / "nan", record={"perplexity": float("nan")})
    assert names(tmp_path) == {"in", "out"}


def test_nothing_is_said(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    code = (
        "import sys, transformers; from sparsessm import checkpoint\n"
        "checkpoint.save(checkpoint.load(sys.argv[1]), sys.argv[2])\n"
        "assert transformers.utils.logging.is_progress_bar_enabled()\n"
    )
    done = new_python("-c", code, tmp_path / "in", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--some--mamba"
    write_stock(repository / "snapshots/0123abc")
    (repository / "snapshots/0123abc/pruning.json").write_text('{"format": 1}')
    write_stock(tmp_path / "hub/models--some--dense/snapshots/4567def")
    for name, commit in (("mamba", "0123abc"), ("dense", "4567def")):
        refs = tmp_path / f"hub/models--some--{name}/refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
    write_original(tmp_path / "original", pico_mamba())
    code = (
        "import sys; from sparsessm import checkpoint\n"
        "for source in sys.argv[1:]:\n"
        "    try: print(checkpoint.load(source).format)\n"
        "    except ValueError as error: print(error)\n"
        "print(checkpoint.read_record('some/mamba'), checkpoint.read_record('some/dense'))\n"
        "try: checkpoint.read_record('some/other')\n"
        "except ValueError as error: print(error)\n"
    )
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    sources = ("some/mamba", "some/other", tmp_path / "original")
    told = new_python("-c", code, *sources, **offline).stdout.splitlines()
    assert told[0] == "transformers"
    assert told[1].startswith("'some/other' is not a local directory, and the hub did not provide it: ")
    assert told[2].startswith(
        "no tokenizer: 'EleutherAI/gpt-neox-20b' is not a local directory, and the hub did not "
    )
    assert told[3] == "{'format': 1} None"
    assert told[4] == told[1]


STOCK_LOGITS = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
tokens = load_file(sys.argv[1])["tokens"]
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, folder + ".logits")
assert not any(name.split(".")[0] == "sparsessm" for name in sys.modules)
"""


def test_a_pruned_model_is_the_same_in_stock_code(tmp_path: Path) -> None:
    """The promise to whoever gets a result: plain transformers computes what was measured here."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    cases: dict[Path, tuple[Tensor, str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        source = tmp_path / f"{dtype}"
        mixed = write_mixed(source, dtype)
        dense = logits_of(adapt(checkpoint.load(source).model), TOKENS)
        for removed, value in REMOVED_A_LOG.items():
            came = sparsessm.load(source)
            report = sparsessm.prune(
                came, removed=removed, data=str(tmp_path / "text.txt"), samples=4, length=16, measure=False
            )
            out = sparsessm.save(came, tmp_path / f"{dtype}-{removed}", report)
            assert dtypes(out) == dtypes(source)
            written = load_file(out / "model.safetensors")
            assert {row.family for row in report.rows} == {"projections", "ssm"}
            for row in report.rows:
                gone = value if row.family == "ssm" else 0.0
                assert row.pruned == int((written[row.target] == gone).sum())
            skip_weight = "backbone.layers.0.mixer.D"
            assert not torch.equal(written[skip_weight], mixed[skip_weight])  # its refit counts too
            ours = logits_of(adapt(came.model, came.stored), TOKENS)
            assert (ours - dense).abs().max() > 1e-3 * dense.abs().max()
            cases[out] = ours, f"{dtype}, {removed}"
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    done = python(STOCK_LOGITS, tmp_path / "tokens", *cases)
    assert done.returncode == 0, done.stderr
    for out, (ours, case) in cases.items():
        stock = load_file(f"{out}.logits")["logits"]
        assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max(), case
