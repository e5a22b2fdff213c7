"""Models read block by block: the same bits as in memory, on every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from directories import write_original
from pico import pico_falcon_mamba, pico_mamba, pico_tokenizer
from whereabouts import MODELS, NOTHING, PLENTY, TOKENS, plain, pruned, same, values, written

from sparsessm.architectures import MODEL_TYPES
from sparsessm.architectures.own import Own
from sparsessm.calibration.loss import losses
from sparsessm.calibration.prices import output_fisher
from sparsessm.checkpoint import Streaming, load, pack, save
from sparsessm.evaluation.perplexity import measure
from sparsessm.studies.tolerance import weights_sha256

RUNS: tuple[dict[str, Any], ...] = (
    {"sparsity": 0.5},
    {"method": "magnitude"},
    {"target": "head", "method": "sparsegpt"},
    {"pattern": "structured:state", "sparsity": 0.5},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_and_dtype_is_that_of_the_model_in_memory(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = written(name, tmp_path / "m", dtype)
    whole, parts = load(source), load(source, streaming=NOTHING)
    assert whole.stored == parts.stored and whole.files == parts.files
    assert same(values(whole), values(parts)) and weights_sha256(whole) == weights_sha256(parts)
    buffers = dict(parts.model.named_buffers())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in whole.model.named_buffers())


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_outside_of_blocks_or_shared_takes_memory(name: str, tmp_path: Path) -> None:
    checkpoint = load(written(name, tmp_path / "m"), streaming=NOTHING)
    architecture = checkpoint.architecture()
    shared = {use for target in architecture.targets for use in target.uses}
    for block in architecture.blocks:
        parameters = list(block.layer.parameters())
        if block.index not in shared:
            assert all(torch.isnan(p).all() and p.untyped_storage().nbytes() == 4 for p in parameters)
        with architecture.holding(block.index):
            assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert torch.isfinite(architecture.tail.targets[0].matrix).all()


@pytest.mark.parametrize("name", MODELS)
def test_forwards_and_gradients_have_the_same_bits(name: str, tmp_path: Path) -> None:
    source = written(name, tmp_path / "m")
    whole, parts = load(source).architecture(), load(source, streaming=NOTHING).architecture()
    assert torch.equal(losses(whole, TOKENS), losses(parts, TOKENS))
    first, second = output_fisher(whole, TOKENS, head=True), output_fisher(parts, TOKENS, head=True)
    assert same(first, second)
    many = TOKENS.repeat(60, 1)  # several groups, which go through a block together here
    assert measure(whole, many, 1) == measure(parts, many, 1)


@pytest.mark.parametrize("fields", RUNS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_runs_have_the_same_bits(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    if fields.get("pattern") == "structured:state" and "state" not in MODEL_TYPES[name].structure:
        fields = {"pattern": "structured:block", "sparsity": 1 / 3}
    source = written(name, tmp_path / "m", torch.bfloat16)
    whole, report = pruned(source, None, **fields)
    parts, other = pruned(source, NOTHING, **fields)
    assert same(values(whole), values(parts)) and plain(report) == plain(other)
    assert whole.stored == parts.stored
    for number, checkpoint in enumerate((whole, parts)):
        save(checkpoint, tmp_path / str(number))
    files = sorted(path.name for path in (tmp_path / "0").iterdir())
    for file in files:
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "structured:block", "sparsity": 0.5},
        {"pattern": "structured", "sparsity": 0.25},
        {"pattern": "structured:channel", "sparsity": 0.5, "by_layer": True},
    ],
    ids=str,
)
def test_whole_units_have_the_same_bits(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    pico_mamba(num_hidden_layers=4).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    if fields.pop("by_layer", False):
        fields |= {"allocation": "loss"}
    whole, report = pruned(folder, None, **fields)
    parts, other = pruned(folder, NOTHING, **fields)
    assert same(values(whole), values(parts)) and plain(report) == plain(other)


def test_original_and_packed_directories_are_read_block_by_block_too(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    write_original(tmp_path / "original", pico_mamba())
    pico_tokenizer().save_pretrained(tmp_path / "original")
    pack(tmp_path / "original", tmp_path / "packed")
    for source in ("original", "packed"):
        whole, parts = load(tmp_path / source), load(tmp_path / source, streaming=NOTHING)
        assert same(values(whole), values(parts)) and whole.stored == parts.stored
        assert whole.prefix == parts.prefix


def wide(folder: Path, make: Any = pico_mamba, **fields: Any) -> Path:
    """A packed directory of a model whose layers have channels of two numbers."""
    make(**fields).save_pretrained(folder / "stock")
    pico_tokenizer().save_pretrained(folder / "stock")
    checkpoint = load(folder / "stock")
    config: Any = checkpoint.model.config
    other = {index: config.intermediate_size - 8 for index in range(1, config.num_hidden_layers)}
    Own(widths=other).give(checkpoint.model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.uniform_(0.1, 1.0, generator=random)
    return save(checkpoint, folder / "wide")


@pytest.mark.parametrize("make", [pico_mamba, pico_falcon_mamba])
def test_layers_that_differ_in_shape_are_read_block_by_block_too(make: Any, tmp_path: Path) -> None:
    source = wide(tmp_path, make, num_hidden_layers=3, use_bias=True)
    whole, parts = load(source), load(source, streaming=NOTHING)
    assert same(values(whole), values(parts)) and whole.stored == parts.stored
    buffers = dict(parts.model.named_buffers())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in whole.model.named_buffers())
    (whole, report), (parts, other) = pruned(source, None), pruned(source, NOTHING)
    assert same(values(whole), values(parts)) and plain(report) == plain(other)


PEAK = """
import sys
from pathlib import Path
from sparsessm.checkpoint import Streaming, load
for source in sys.argv[1:]:  # the first sets up what is set up at the first use
    held = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    Path("/proc/self/clear_refs").write_text("5")
    load(source, streaming=Streaming(1))
    most = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print((int(most[0].split()[1]) - int(held[0].split()[1])) >> 10)
"""


def test_a_packed_model_whose_layers_differ_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """20 layers of 6 MiB are 120 MiB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the peak of a process")
    small = wide(tmp_path / "small", num_hidden_layers=2)
    large = wide(tmp_path / "large", hidden_size=256, intermediate_size=2048, num_hidden_layers=20)
    _, grown = map(int, python(PEAK, small, large).stdout.split())
    assert grown < 60, grown


def test_what_has_room_stays_in_memory(tmp_path: Path) -> None:
    source = written("mamba", tmp_path / "m")
    checkpoint = load(source, streaming=Streaming(PLENTY, tmp_path))
    architecture = checkpoint.architecture()
    losses(architecture, TOKENS)
    assert all(torch.isfinite(parameter).all() for parameter in checkpoint.model.parameters())
    assert torch.equal(losses(load(source).architecture(), TOKENS), losses(architecture, TOKENS))


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = written("mamba", tmp_path / "m")
    checkpoint = load(source, streaming=NOTHING)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="was changed while it was read"):
        losses(checkpoint.architecture(), TOKENS)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scratch = written("mamba", tmp_path / "m"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    checkpoint, _ = pruned(source, NOTHING)
    assert list(scratch.iterdir())
    del checkpoint
    import gc

    gc.collect()
    assert not list(scratch.iterdir())
