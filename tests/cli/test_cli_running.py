"""The commands generate, export, pack and unpack: what they print where, what they refuse."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from command import COMMAND, refused, row_of, run
from pico import pico_mamba, pico_tokenizer
from programs import Program
from safetensors.torch import load_file

from sparsessm import kernels, runtime

pytestmark = pytest.mark.usefixtures("here")
ENDLESS = ["-n", "1000000"]  # more than a pipe holds


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one with every second entry of its linear layers removed."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("dense", "sparse"):
        model = pico_mamba()
        if name == "sparse":
            with torch.no_grad():
                for parameter in model.backbone.layers.parameters():
                    if parameter.dim() == 2 and parameter.shape[1] > 1:
                        parameter[:, ::2] = 0
        model.save_pretrained(folder / name)
        pico_tokenizer().save_pretrained(folder / name)
    return folder


def test_generate_prints_the_text_and_says_the_speed_elsewhere() -> None:
    done = runtime.load("dense").generate("the state", 12)
    outcome = run("generate", "dense", "the state", "-n", "12")
    assert outcome.stdout == done.text + "\n"
    said = outcome.stderr.strip()
    tokens = len(done.prompt_ids)
    assert said.startswith(f"prompt: {tokens} tokens, ") and "tokens/s; continuation: 12 tokens, " in said
    assert said.endswith(" tokens/s; ended by length")
    quiet = run("generate", "dense", "the state", "-n", "12", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.text + "\n", "")
    assert run("generate", "dense", "-", "-n", "12", stdin="the state").stdout == done.text + "\n"
    assert run("generate", "dense", "the state", "-n", "0").stdout == "\n"


def test_generate_as_one_document() -> None:
    outcome = run("generate", "dense", "the state", "--max-new-tokens", "9", "--json", "--quiet")
    document, done = json.loads(outcome.stdout), runtime.load("dense").generate("the state", 9)
    assert outcome.stderr == ""
    assert document.pop("seconds").keys() == {"prompt", "decode"}
    assert document == {
        "model": "dense",
        "text": done.text,
        "ids": done.ids,
        "finish": "length",
        "prompt_tokens": len(done.prompt_ids),
        "new_tokens": 9,
    }


def test_every_option_of_generate_arrives() -> None:
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 3}
    done = runtime.load("dense").generate("a", 30, **options)
    stop = next(letter for letter in done.text[5:] if letter.strip())
    expected = runtime.load("dense").generate("a", 30, stop=[stop, "zz"], **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    line = ["generate", "dense", "a", "-n", "30", *flags, "--stop", "zz", "--stop", stop, "--threads", "1"]
    assert run(*line, "--tokenizer", "sparse", "--quiet").stdout == expected.text + "\n"
    assert expected.finish == "stop"
    help_text = " ".join(run("generate", "--help").stdout.split())
    for name in (*options, "stop", "threads", "tokenizer", "max_new_tokens"):
        assert f"--{name.replace('_', '-')}" in help_text


def test_generate_streams() -> None:
    """Every piece is on its way before the next token is read: it does not end before it is heard."""
    assert runtime.load("dense").generate("the state", 2000).finish == "length", "it turns in circles"
    with Program([*COMMAND, "generate", "dense", "the state", "--quiet", *ENDLESS]) as process:
        assert process.stdout.read(10)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143


def test_a_reader_that_leaves_is_no_mistake() -> None:
    with Program([*COMMAND, "generate", "dense", "the state", *ENDLESS]) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature is -1.0; allowed: 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", "3"], "top_k has no effect at temperature 0"),
        (["--temperature", "1", "--top-k", "0"], "top_k is 0"),
        (["--temperature", "1", "--top-p", "2"], "top_p is 2.0"),
        (["--stop", ""], "stop holds ''"),
        (["--seed", "-1"], "seed is -1"),
        (["--threads", "0"], "threads is 0"),
        (["--tokenizer", "no/such/place"], "no tokenizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_in_one_line(arguments: list[str], words: str) -> None:
    assert words in refused("generate", "dense", "a", *arguments)


def test_generate_needs_a_model_and_a_prompt() -> None:
    assert "no such directory: 'absent/x/y'" in refused("generate", "absent/x/y", "a")
    assert "PROMPT" in run("generate", "dense", code=2).stderr
    assert "max-new-tokens" in run("generate", "dense", "a", "-n", "-1", code=2).stderr


def test_the_slow_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NATIVE", False)
    outcome = run("generate", "dense", "the state", "-n", "3")
    note = "note: the native kernels are not installed; the slow reference is used"
    assert outcome.stderr.splitlines()[0] == note
    assert run("generate", "dense", "the state", "-n", "3", "--quiet").stderr == ""


def test_export() -> None:
    outcome = run("export", "sparse", "--gguf", "m.gguf")
    assert "Saved to m.gguf." in outcome.stdout and "exporting sparse" in outcome.stderr
    size = Path("m.gguf").stat().st_size
    assert row_of(outcome.stdout, "the file") == ["the file", "f32", "22", f"{size:,}"]
    assert row_of(outcome.stdout, "ssm_in.weight") == ["ssm_in.weight", "f32", "2", f"{2 * 64 * 16 * 4:,}"]
    assert "'m.gguf' exists" in refused("export", "sparse", "--gguf", "m.gguf")
    quiet = run("export", "sparse", "--gguf", "m.gguf", "--type", "bf16", "--force", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "") and Path("m.gguf").stat().st_size < size
    outcome = run("export", "sparse", "--gguf", "m.gguf", "--type", "q8_0", "--force", "--json", "-q")
    document = json.loads(outcome.stdout)
    size = Path("m.gguf").stat().st_size
    said = {"model": "sparse", "out": "m.gguf", "type": "q8_0", "bytes": size}
    assert document | said == document and outcome.stderr == ""
    # rows of 16 are no whole blocks
    assert document["tensors"]["ssm_in.weight"] == {"type": "f16", "count": 2, "bytes": 2 * 64 * 16 * 2}
    assert document["tensors"]["ssm_out.weight"] == {"type": "q8_0", "count": 2, "bytes": 2 * 16 * 34}
    assert "type is 'q3'; allowed: bf16" in refused("export", "sparse", "--gguf", "n.gguf", "--type", "q3")
    assert "head is 'q3'; allowed: bf16" in refused("export", "sparse", "--gguf", "n.gguf", "--head", "q3")
    assert not Path("n.gguf").exists()


def test_pack_and_back() -> None:
    outcome = run("pack", "sparse", "-o", "small")
    words = " ".join(outcome.stdout.split())
    assert "2:4 float32" in words
    assert "Saved to small." in words
    assert "packing sparse" in outcome.stderr
    dense, packed = Path("sparse/model.safetensors"), Path("small/packed.safetensors")
    assert packed.stat().st_size < dense.stat().st_size
    text = run("generate", "sparse", "the state", "-n", "20", "--quiet").stdout
    assert run("generate", "small", "the state", "-n", "20", "--quiet").stdout == text
    assert "Saved to back" in run("unpack", "small", "-o", "back").stdout
    before, after = load_file(dense), load_file("back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(run("unpack", "small", "-o", "back", "--force", "--json", "-q").stdout) == {
        "model": "small",
        "out": "back",
        "rounded": None,
    }


def test_pack_as_one_document() -> None:
    outcome = run("pack", "sparse", "-o", "small", "--json", "--quiet")
    document = json.loads(outcome.stdout)
    assert outcome.stderr == ""
    before = sum(tensor.nbytes for tensor in load_file("sparse/model.safetensors").values())
    after = Path("small/packed.safetensors").stat().st_size
    assert document["bytes"] == {"before": before, "after": after, "ratio": after / before}
    rows = document["tensors"]
    assert sum(row["before"] for row in rows.values()) == before
    assert rows["in_proj"]["before"] == 2 * 64 * 16 * 4
    assert rows["in_proj"]["after"] < rows["in_proj"]["before"]
    assert (document["model"], document["out"]) == ("sparse", "small")


def test_pack_in_another_dtype() -> None:
    run("pack", "dense", "-o", "half", "--dtype", "bf16", "--quiet")
    rows = json.loads(
        run("pack", "dense", "-o", "byte", "--dtype", "int8", "--head", "int8", "--json").stdout
    )
    assert rows["tensors"]["embeddings"]["forms"] == ["dense int8"]
    assert rows["tensors"]["embeddings"]["before"] == 64 * 16 * 4
    for folder in ("half", "byte"):
        assert run("generate", folder, "the state", "-n", "5", "--quiet").stdout.strip()


def test_what_pack_and_unpack_refuse(here: Path) -> None:
    run("pack", "dense", "-o", "small", "--quiet")
    assert "'small' exists" in refused("pack", "dense", "-o", "small")
    run("pack", "sparse", "-o", "small", "--force", "--quiet")
    assert "'small' is already packed" in refused("pack", "small", "-o", "again")
    assert "'dense' is not packed" in refused("unpack", "dense", "-o", "again")
    assert "unknown dtype 'int4'; known: fp32, bf16, int8" in refused(
        "pack", "dense", "-o", "again", "--dtype", "int4"
    )
    assert "'int4' of the head" in refused("pack", "dense", "-o", "again", "--head", "int4")
    assert "--out" in run("pack", "dense", code=2).stderr
    assert sorted(path.name for path in here.iterdir()) == ["dense", "small", "sparse"]
