"""Directories of models with projected states: there and back, and what is wrong in one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import names, write_stock
from lively import TOKENS, stock
from projections import B1, C1, FAST, NAME, by_hand, write_dense, write_projected
from safetensors.torch import load_file, save_file
from stock import difference
from torch import Tensor

import sparsessm
from sparsessm import checkpoint, runtime
from sparsessm.architectures import adapt, projected
from sparsessm.checkpoint import Checkpoint, container, packed, packed_file, writing
from sparsessm.checkpoint.encoding import Encoded, encode
from sparsessm.runtime.reference import ReferenceEngine

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def half() -> Checkpoint:
    """In memory, and in directory "half": 4 directions in place of 8 states in both layers."""
    write_dense(Path("dense"))
    model = sparsessm.load("dense")
    architecture = adapt(model.model, model.stored)
    draw = torch.Generator().manual_seed(7)
    for block in architecture.blocks:
        architecture.project(block, *torch.randn(2, 2, 4, 8, generator=draw) / 2)
    model.stored = dict(architecture.stored)
    sparsessm.save(model, "half")
    return model


def assert_same_tensors(left: Any, right: Any) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_there_and_back_to_the_bit(layout: str) -> None:
    model = write_projected(Path("half"), layout)
    dense, came = sparsessm.load("dense"), sparsessm.load("half")
    assert came.format == model.format == layout
    assert came.stored == model.stored and not came.model.training
    directions = projected.directions_of(came.model)
    assert directions == projected.directions_of(model.model) and sum(directions.values()) == 8
    assert_same_tensors(came.model, model.model)
    assert torch.equal(stock(came.model), stock(model.model))
    assert difference(stock(came.model), stock(dense.model)) > 1e-3
    held_, weights = packed.read("half").tensors, came.model.state_dict()
    for name, tensor in held_.items():
        assert tensor.dtype == dense.stored.get(name, torch.float32), name
        assert torch.equal(tensor.decode(torch.float32), weights[name])
    assert {tensor.dtype for tensor in held_.values()} == {torch.float32, torch.bfloat16}
    assert came.model.config.state_size == 8 and came.model.config.use_cache is False
    assert not any(name.startswith(("model", "pytorch_model")) for name in names(Path("half")))
    sparsessm.save(came, "again")
    files = {name: Path("again", name).read_bytes() for name in names(Path("again"))}
    assert files[container.PACKED] == Path("half", container.PACKED).read_bytes()
    ready = runtime.load("half")
    ids = TOKENS[0]
    assert difference(ready.logits(ids), stock(model.model, ids[None])[0]) <= 2e-5


def test_the_record_and_the_card_say_what_it_is() -> None:
    model = write_projected(Path("half")).model
    text = Path("half/README.md").read_text()
    words = " ".join(text.split())
    assert "library_name" not in text and "AutoModelForCausalLM" not in text
    assert "only sparsessm can load" in words and "50.00 %" in words
    record = json.loads(Path("half/pruning.json").read_text())
    assert {row["removed"] for row in record["targets"]} == {"projected"}
    assert [row["pruned"] for row in record["targets"]] == [
        2 * (8 - projected.directions_of(model).get(layer, 8)) for layer in range(2)
    ]
    assert model.config.state_size == 8


def test_what_no_stock_checkpoint_can_hold(half: Checkpoint) -> None:
    before = names(Path())
    for attempt in (
        lambda: checkpoint.unpack("half", "out"),
        lambda: writing.save(half, "out"),
        lambda: writing.save(sparsessm.load("half"), "out"),
    ):
        with pytest.raises(ValueError, match=r"'(half|dense)' has projected states, which no stock"):
            attempt()
        assert names(Path()) == before


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_a_projected_directory_is_packed_again_in_another_dtype(half: Checkpoint, dtype: str | None) -> None:
    told = packed.pack("half", "small", dtype=dtype, head="int8" if dtype == "int8" else None)
    was, now = packed.read("half").tensors, packed.read("small").tensors
    assert was.keys() == now.keys() and told.after == Path("small", container.PACKED).stat().st_size
    for layer in range(2):
        for name in projected.MATRICES:
            old, new = was[NAME.format(layer, name)], now[NAME.format(layer, name)]
            assert new.values.dtype == new.dtype == torch.float32
            assert torch.equal(new.decode(), old.decode())
        kept = now[NAME.format(layer, "in_proj.weight")].values.dtype
        assert kept == (torch.int8 if dtype == "int8" else torch.bfloat16)
    model = runtime.load("small")
    weights = {name: tensor.decode(torch.float32) for name, tensor in now.items()}
    truth, ids = ReferenceEngine(model.config, weights), TOKENS[0]
    want = truth.prompt(ids, truth.new_state(1)[0], every=True)
    assert difference(model.logits(ids), want) <= (0.08 if dtype == "int8" else 2e-5)
    assert difference(stock(sparsessm.load("small").model, ids[None])[0], want) <= 2e-5
    assert names(Path("small")) == names(Path("half"))


def test_a_packed_directory_without_projections_is_not_packed_again() -> None:
    write_dense(Path("dense"))
    packed.pack("dense", "packed")
    with pytest.raises(ValueError, match="is already packed"):
        packed.pack("packed", "again", dtype="bf16")
    assert not Path("again").exists()


def as_it(name: str, values: Tensor) -> dict[str, Encoded]:
    return {name: encode(name, values, kind="dense")}


def without(name: str) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def both_of(*shape: int) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: tensors | as_it(B1, torch.ones(shape)) | as_it(C1, torch.ones(shape))


def one_of(name: str, *shape: int) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: tensors | as_it(name, torch.ones(shape))


def no_directions(tensors: dict[str, Encoded]) -> dict[str, Encoded]:
    """As only the container writes it."""
    none = {name: replace(tensors[name], shape=(2, 0, 8), values=torch.empty(2, 0, 8)) for name in (B1, C1)}
    return tensors | none


WRONG: list[tuple[Callable[[dict[str, Encoded]], dict[str, Encoded]], str]] = [
    (without(B1), f"missing tensors: {B1}"),
    (without(C1), f"missing tensors: {C1}"),
    (one_of(B1, 2, 5, 8), f"wrong shapes: {B1}"),
    (one_of(C1, 2, 5, 8), "wrong shapes: .*_projection"),
    (one_of(B1, 2, 4), f"wrong shapes: {B1}"),
    (one_of(C1, 2, 4, 8, 1), f"wrong shapes: {C1}"),
    (one_of(C1, 2, 4, 7), f"wrong shapes: {C1}"),
    (one_of(B1, 1, 4, 8), f"wrong shapes: {B1}"),
    (one_of(B1, 2, 9, 8), f"wrong shapes: {B1}"),
    (both_of(2, 9, 8), f"tensors the model does not have: .*{B1}"),
    (no_directions, f"tensors the model does not have: .*{B1}"),
    (both_of(2, 4, 9), f"wrong shapes: .*{B1}"),
    (one_of(NAME.format(2, "B_projection"), 2, 4, 8), r"does not have: backbone\.layers\.2\.mixer\.B_proj"),
    (one_of(NAME.format("01", "B_projection"), 2, 4, 8), r"does not have: backbone\.layers\.01\.mixer\.B_p"),
    (one_of(NAME.format(10**30, "B_projection"), 2, 4, 8), "does not have: .*0000.mixer.B_projection"),
    (one_of("B_projection", 2, 4, 8), "does not have: B_projection"),
    (one_of(NAME.format(0, "D_projection"), 2, 4, 8), "does not have: .*mixer.D_projection"),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG)
def test_projections_that_do_not_fit_are_refused_by_name(
    half: Checkpoint, spoil: Callable[[dict[str, Encoded]], dict[str, Encoded]], words: str
) -> None:
    packed_file.write(
        Path("half", container.PACKED), "transformers", spoil(dict(packed.read("half").tensors))
    )
    assert half.source == "dense"
    for attempt in (packed.read, sparsessm.load, runtime.load, lambda path: packed.pack(path, "out")):
        with pytest.raises(ValueError, match=words) as caught:
            attempt("half")
        assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_projection_that_is_not_a_number_is_refused(half: Checkpoint) -> None:
    tensors = dict(packed.read("half").tensors)
    broken = half.model.state_dict()[B1].clone()
    broken[0, 0, 0] = torch.inf
    packed_file.write(
        Path("half", container.PACKED), "transformers", tensors | {B1: replace(tensors[B1], values=broken)}
    )
    with pytest.raises(ValueError, match=B1):
        sparsessm.load("half")


def test_a_mamba_1_has_no_projections() -> None:
    write_stock(Path("one"))
    packed.pack("one", "small")
    tensors = dict(packed.read("small").tensors)
    for shape in ((1, 4, 8), (2, 4, 8)):
        packed_file.write(
            Path("small", container.PACKED), "transformers", tensors | as_it(B1, torch.ones(shape))
        )
        for attempt in (packed.read, sparsessm.load, runtime.load):
            with pytest.raises(ValueError, match=f"does not have: {B1}"):
                attempt("small")


def test_a_stock_file_has_no_projections(half: Checkpoint) -> None:
    file = Path("dense/model.safetensors")
    more = {name: half.model.state_dict()[name].clone() for name in (B1, C1)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not have: .*{B1}"):
        sparsessm.load("dense")


@pytest.mark.parametrize("recipe", [{"method": "magnitude"}, {}, {"target": "ssm"}, {"pattern": "2:4"}])
def test_single_entries_of_a_projected_model_go_as_of_any(half: Checkpoint, recipe: dict[str, Any]) -> None:
    assert half.source == "dense"
    model = sparsessm.load("half")
    report = sparsessm.prune(model, **recipe, **FAST, sparsity=0.5, measure=False)
    assert {row.removed for row in report.rows} <= {"zero", "memoryless"} and len(report.rows) > 1
    assert projected.directions_of(model.model) == {0: 4, 1: 4}
    assert difference(stock(model.model), by_hand(model.model, TOKENS).float()) <= 2e-5
    before = half.model.state_dict()
    for name in (B1, C1):
        assert torch.equal(model.model.state_dict()[name], before[name])
    sparsessm.save(model, "thin", report)
    came = sparsessm.load("thin")
    assert_same_tensors(came.model, model.model)
    assert torch.equal(stock(came.model), stock(model.model))
    assert difference(runtime.load("thin").logits(TOKENS[0]), stock(came.model, TOKENS[:1])[0]) <= 2e-5
    if "target" not in recipe:  # heads without memory make no file smaller
        assert Path("thin", container.PACKED).stat().st_size < Path("half", container.PACKED).stat().st_size


@pytest.mark.parametrize("recipe", [{"method": "magnitude"}, {"pattern": "structured:block"}])
def test_the_card_of_a_projected_model_pruned_further_names_what_loads_it(
    half: Checkpoint, recipe: dict[str, Any]
) -> None:
    assert half.source == "dense"
    model = sparsessm.load("half")
    report = sparsessm.prune(model, **recipe, **FAST, sparsity=0.5, measure=False)
    sparsessm.save(model, "thin", report)
    assert (Path("thin") / container.PACKED).is_file()
    text = Path("thin/README.md").read_text()
    assert "AutoModelForCausalLM" not in text and "library_name: transformers" not in text


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_projected_model_without_a_block_comes_back(layout: str) -> None:
    was = projected.directions_of(write_projected(Path("half"), layout).model)
    model = sparsessm.load("half")
    report = sparsessm.prune(model, pattern="structured:block", sparsity=0.5, **FAST, measure=False)
    sparsessm.save(model, "one", report)
    came = sparsessm.load("one")
    assert came.model.config.num_hidden_layers == 1 and len(was) == 2
    assert projected.directions_of(came.model) in ({0: was[0]}, {0: was[1]})
    assert_same_tensors(came.model, model.model)
    assert difference(runtime.load("one").logits(TOKENS[0]), stock(model.model, TOKENS[:1])[0]) <= 2e-5
