"""Layers of different widths: who keeps how many channels, and what becomes of such a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forward import logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from planned import prune
from torch import Tensor

import sparsessm
from sparsessm import runtime
from sparsessm.architectures import adapt
from sparsessm.architectures.own import Own
from sparsessm.calibration.prices import row_prices
from sparsessm.checkpoint import container, pack, packed_file, unpack
from sparsessm.checkpoint.encoding import encode
from sparsessm.pruning import preview, units, widths
from sparsessm.pruning.widths import allot
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import order

WORDS: dict[str, Any] = {"pattern": "structured:channel", "allocation": "loss", "sparsity": 0.5}
FAST: dict[str, Any] = {"samples": 4, "length": 16, "data": "text.txt"}
TOKENS = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(f"a state {n} is kept" for n in range(400)))


def uneven(make: Callable[..., Any] = pico_mamba, width: int = 64, **fields: Any) -> Any:
    """Three layers of 64 channels, of which the second is hardly heard."""
    torch.manual_seed(3)
    model = make(num_hidden_layers=3, intermediate_size=width, time_step_rank=3, **fields)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(20)
        model.backbone.layers[1].mixer.out_proj.weight.mul_(1e-3)
    return model.eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def settled(model: Any, tokens: Tensor = TOKENS, **recipe: Any) -> tuple[Any, list[Any]]:
    architecture = adapt(copy.deepcopy(model))
    asked = Recipe(**WORDS | recipe).resolved(model="m", trained_length=tokens.shape[1])
    return architecture.model, prune(architecture, asked, tokens).rows


def of_layers(model: Any) -> list[int]:
    return [len(layer.mixer.D) for layer in model.backbone.layers]


def write(model: Any, folder: str = "dense") -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)


@given(layers=st.integers(1, 4), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_steps_that_are_taken_cost_the_least(layers: int, data: st.DataObject) -> None:
    """Against all ways; a layer's own steps come in their order and cost more and more."""
    each = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=4, max_size=4).map(sorted)
    curves = [data.draw(each) for _ in range(layers)]
    total = data.draw(st.integers(0, 4 * layers))
    counts = allot(curves, total)
    assert len(counts) == layers and sum(counts) == total and all(0 <= count <= 4 for count in counts)

    def cost(way: Any) -> float:
        return sum(sum(curve[:count]) for curve, count in zip(curves, way, strict=True))

    ways = (way for way in itertools.product(range(5), repeat=layers) if sum(way) == total)
    assert cost(counts) == min(map(cost, ways))


def test_a_cheap_step_behind_a_dear_one_is_not_reached_without_it() -> None:
    assert allot([[5.0, 0.0, 0.0], [1.0, 2.0, 3.0]], 3) == [0, 3]


@pytest.mark.parametrize("make", [pico_mamba, pico_falcon_mamba])
@pytest.mark.parametrize("price", ["none", None])
def test_a_layer_that_nobody_hears_gives_the_most(make: Callable[..., Any], price: str | None) -> None:
    model = uneven(make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, rows = settled(model, price=price)
    found = of_layers(small)
    assert sum(found) == 3 * 32 and found[1] == 16 == min(found), "one in eight, and a multiple of 16"
    assert all(count % 16 == 0 for count in found)
    assert [row.total - row.pruned for row in rows] == found and {row.removed for row in rows} == {"cut"}
    assert small.config.intermediate_size == 64, "no configuration says it"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    got = logits(small)
    assert torch.isfinite(got).all()
    assert (logits_of(adapt(small), TOKENS) - got).abs().max() <= 1e-5 * got.abs().max()


def test_layers_of_need_are_nearer_to_the_dense_model_than_equal_ones() -> None:
    model = uneven()
    want = logits(model)
    own, equal = (logits(settled(model, allocation=how)[0]) for how in ("loss", "uniform"))
    assert (own - want).norm() < 0.9 * (equal - want).norm()


def test_widths_are_asked_of_the_dense_model() -> None:
    architecture = adapt(uneven())
    before = {name: tensor.clone() for name, tensor in architecture.model.state_dict().items()}
    wanted = order(Recipe(**WORDS), architecture)
    assert wanted.by_layer and wanted.sizes == {"channel": 32}
    costs = row_prices(architecture, TOKENS)
    seen: list[tuple[str, int, int, str]] = []
    found = widths.find(architecture, wanted, TOKENS, costs, lambda *what: seen.append(what))
    assert found.keys() == {0, 1, 2} and sum(found.values()) == 96 and seen[-1] == ("widths", 3, 3, "")
    after = architecture.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    now = sum(parameter.numel() for parameter in architecture.model.parameters())
    told = preview.units(wanted, architecture)["parameters"]
    small, _ = settled(architecture.model)
    assert told == {"now": now, "after": sum(parameter.numel() for parameter in small.parameters())}


@pytest.mark.parametrize("make", [pico_mamba, pico_falcon_mamba])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(make: Callable[..., Any], tied: bool) -> None:
    write(uneven(make, tie_word_embeddings=tied))
    config = Path("dense/config.json").read_bytes()
    model = sparsessm.load("dense")
    report = sparsessm.prune(model, **FAST, **WORDS, measure=False)
    assert report.packed and "only sparsessm can load" in report.honesty()
    sparsessm.save(model, "own", report)
    assert (Path("own") / container.PACKED).is_file() and Path("own/config.json").read_bytes() == config
    card = Path("own/README.md").read_text()
    assert "sparsessm.runtime.load" in card and "AutoModelForCausalLM" not in card
    again = sparsessm.load("own")
    before, after = model.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and of_layers(again.model) == of_layers(model.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(model.model), logits(again.model)) and again.stored == model.stored
    engine = runtime.load("own").engine
    got = engine.prompt(TOKENS[0], engine.new_state(1)[0], every=True)
    want = logits(again.model)[0]
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    state, rows = engine.new_state(1), []
    for token in TOKENS[0]:
        rows.append(engine.step(token[None], state)[0])
    assert (torch.stack(rows) - want).abs().max() <= 2e-5 * want.abs().max()
    with pytest.raises(
        ValueError, match="has layers of different widths, which no stock checkpoint can hold"
    ):
        unpack("own", "stock")
    for held in (model, again):
        with pytest.raises(ValueError, match=r"save it with sparsessm\.save"):
            held.model.save_pretrained("stock")
    assert not Path("stock").exists()
    done = pack("own", "small", dtype="int8")
    assert done.after < (Path("own") / container.PACKED).stat().st_size
    assert Own.of(sparsessm.load("small").model) == Own.of(again.model)


def test_pruned_further() -> None:
    write(uneven())
    model = sparsessm.load("dense")
    sparsessm.save(model, "own", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    again = sparsessm.load("own")
    report = sparsessm.prune(again, **FAST, sparsity=0.5, measure=False)
    sparsessm.save(again, "thin", report)
    assert of_layers(sparsessm.load("thin").model) == of_layers(model.model)
    assert Path("thin/packed.safetensors").stat().st_size < Path("own/packed.safetensors").stat().st_size
    shallow = sparsessm.load("own")
    sparsessm.prune(shallow, **FAST, pattern="structured:block", sparsity=1 / 3, measure=False)
    sparsessm.save(shallow, "shallow")
    assert len(of_layers(sparsessm.load("shallow").model)) == 2
    for pattern in ("structured:channel", "structured:state"):
        with pytest.raises(
            ValueError, match="only blocks can be removed from a model with layers of different widths"
        ):
            sparsessm.prune(sparsessm.load("own"), **FAST, pattern=pattern, sparsity=0.5, measure=False)
    with pytest.raises(ValueError, match="layers of a Mamba-1 different widths; this one has them already"):
        sparsessm.prune(sparsessm.load("own"), **FAST, **WORDS, measure=False)


def test_who_has_no_widths_is_told_so() -> None:
    with pytest.raises(ValueError, match="layers of a Mamba-1 different widths; this is a Mamba2"):
        order(Recipe(**WORDS), adapt(pico_mamba2()))


@pytest.mark.parametrize(
    "name", ["A_log", "in_proj.weight", "conv1d.weight", "out_proj.weight", "x_proj.weight"]
)
def test_a_tensor_of_another_width_is_refused_by_name(name: str) -> None:
    write(uneven())
    model = sparsessm.load("dense")
    sparsessm.save(model, "own", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    header = container.read_header(Path("own") / container.PACKED)
    tensors = dict(container.read_tensors(header, header.shapes))
    whole = f"backbone.layers.1.mixer.{name}"
    dense = sparsessm.load("dense")
    tensors[whole] = encode(whole, dense.model.state_dict()[whole], kind="dense")
    packed_file.write(Path("own") / container.PACKED, "transformers", tensors)
    for read in (sparsessm.load, runtime.load):
        with pytest.raises(ValueError, match=f"wrong shapes: {whole}"):
            read("own")


@pytest.mark.parametrize(
    ("channels", "share", "mean"), [(64, 0.75, 16), (64, 0.99, 16), (64, 0.01, 48), (40, 0.3, 28)]
)
def test_what_is_promised_is_taken(channels: int, share: float, mean: int) -> None:
    model = uneven(width=channels)
    architecture = adapt(model)
    wanted = order(Recipe(**WORDS | {"sparsity": share}), architecture)
    assert wanted.sizes == {"channel": mean}
    told = preview.units(wanted, architecture)
    small, rows = settled(model, sparsity=share)
    assert sum(of_layers(small)) == 3 * mean == sum(row.total - row.pruned for row in rows)
    assert told["by_layer"] and told["parameters"]["after"] == sum(p.numel() for p in small.parameters())


def test_layers_that_end_alike_are_a_stock_model() -> None:
    write(uneven())
    model = sparsessm.load("dense")
    report = sparsessm.prune(model, **FAST, **WORDS | {"sparsity": 0.75}, measure=False)
    assert of_layers(model.model) == [16, 16, 16] and not report.packed
    sparsessm.save(model, "narrow", report)
    assert (Path("narrow") / "model.safetensors").is_file()
    assert type(model.model).from_pretrained("narrow").config.intermediate_size == 16
    again = sparsessm.load("narrow")
    sparsessm.prune(again, **FAST, pattern="structured:state", sparsity=0.5, measure=False)
    again.model.save_pretrained("stock")


@pytest.mark.parametrize("used", [True, False])
def test_blocks_that_leave_layers_alike_leave_a_stock_model(used: bool) -> None:
    model = uneven()
    model.config.use_cache = used
    small, _ = settled(model)
    assert len(set(of_layers(small))) > 1 and small.config.use_cache is False
    with pytest.raises(ValueError, match=r"save it with sparsessm\.save"):
        small.save_pretrained("no")
    architecture = adapt(small)
    while len(set(of_layers(small))) > 1:
        architecture.drop(0)
    assert small.config.intermediate_size == of_layers(small)[0] and small.config.use_cache is used
    small.save_pretrained("stock")


def test_a_share_of_all_parameters_is_not_guessed_where_layers_differ() -> None:
    small, _ = settled(uneven())
    with pytest.raises(ValueError, match="layers have different widths; use pattern 'structured:block'"):
        order(Recipe(pattern="structured", sparsity=0.3), adapt(small))


def test_a_packed_stock_model_beside_another_config_is_refused() -> None:
    write(uneven())
    pack("dense", "small")
    config = Path("small/config.json")
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 128'))
    for read in (sparsessm.load, runtime.load):
        with pytest.raises(ValueError, match="do not fit config.json"):
            read("small")


def test_loading_draws_nothing_from_the_global_generator() -> None:
    write(uneven())
    model = sparsessm.load("dense")
    sparsessm.save(model, "own", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sparsessm.load("own")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_interrupted_is_not_written_by_stock_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = uneven(), itertools.count()
    cut = units._shrink_block

    def twice(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return cut(*arguments)

    monkeypatch.setattr(units, "_shrink_block", twice)
    architecture = adapt(model)
    with pytest.raises(KeyboardInterrupt):
        prune(architecture, Recipe(**WORDS).resolved(model="m", trained_length=24), TOKENS)
    with pytest.raises(ValueError, match=r"save it with sparsessm\.save"):
        model.save_pretrained("stock")
