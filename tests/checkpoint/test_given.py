"""What the Python door is given: models that their user has changed, torch told otherwise, wrong types."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_mamba
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning

import sparsessm
from sparsessm.checkpoint import Checkpoint
from sparsessm.runtime.threads import MOST_THREADS

pytestmark = pytest.mark.usefixtures("here")

untyped: Any = sparsessm  # what a type checker would refuse
FAST: dict[str, Any] = {"data": "text.txt", "samples": 2, "length": 16}
DOORS: dict[str, Callable[[Any], Any]] = {
    "prune": lambda checkpoint: sparsessm.prune(checkpoint, **FAST, measure=False),
    "evaluate": lambda checkpoint: sparsessm.evaluate(checkpoint, "text.txt", length=16, limit=2),
    "save": lambda checkpoint: sparsessm.save(checkpoint, "out"),
    "runtime.of": lambda checkpoint: sparsessm.runtime.of(checkpoint),
}


@pytest.fixture
def dense(here: None) -> Checkpoint:
    return sparsessm.load("dense")


@pytest.fixture(scope="module")
def untouched(shelf: Path) -> Checkpoint:
    """For calls that are refused."""
    return sparsessm.load(shelf / "dense")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "what", [None, "dense", {}, nn.Linear(2, 2), pico_mamba()], ids=lambda what: type(what).__name__
)
def test_what_is_no_checkpoint_is_named(door: str, what: Any) -> None:
    name = type(what).__name__
    with pytest.raises(TypeError, match=rf"^{door} takes what sparsessm.load returned .*, got {name}"):
        DOORS[door](what)


def in_proj(checkpoint: Checkpoint) -> Any:
    return checkpoint.model.get_submodule("backbone.layers.1.mixer.in_proj")


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _compiled(checkpoint: Checkpoint) -> None:
    checkpoint.model._compiled_call_impl = len  # as compile() leaves it, which takes long to import


def _wrapped(checkpoint: Checkpoint) -> None:
    checkpoint.model = nn.DataParallel(checkpoint.model)  # pyright: ignore[reportAttributeAccessIssue]


def _shortened(checkpoint: Checkpoint) -> None:
    layers: Any = checkpoint.model.get_submodule("backbone.layers")
    del layers[1]


def _sparse(checkpoint: Checkpoint) -> None:
    in_proj(checkpoint).weight = nn.Parameter(in_proj(checkpoint).weight.data.to_sparse())


def _quantised(checkpoint: Checkpoint) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own way to say that it will go
        made = torch.ao.quantization.quantize_dynamic(checkpoint.model, {nn.Linear})
    checkpoint.model = made  # pyright: ignore[reportAttributeAccessIssue]


CHANGES: dict[str, tuple[Callable[[Checkpoint], Any], str]] = {
    "bfloat16": (lambda c: c.model.bfloat16(), "is torch.bfloat16; convert the model back"),
    "float16": (lambda c: c.model.half(), "is torch.float16; convert the model back"),
    "float64": (lambda c: c.model.double(), "is torch.float64; convert the model back"),
    "one tensor": (lambda c: in_proj(c).bfloat16(), "layers.1.mixer.in_proj.weight is torch.bfloat16"),
    "meta": (lambda c: nn.Module.to(c.model, "meta"), "is on the meta device"),
    "compiled": (_compiled, "the model is compiled"),
    "wrapped": (_wrapped, "of type DataParallel, not the stock model"),
    "parametrised": (
        lambda c: parametrize.register_parametrization(in_proj(c), "weight", Halved()),
        "no tensor backbone.layers.1.mixer.in_proj.weight any more; it is parametrised",
    ),
    "pruned by torch": (
        lambda c: pruning.random_unstructured(in_proj(c), "weight", 0.5),
        "call torch.nn.utils.prune.remove",
    ),
    "sparse": (_sparse, r"in_proj.weight is not a plain dense tensor \(torch.sparse_coo\)"),
    "quantised": (_quantised, "no tensor backbone.layers.0.mixer.in_proj.weight any more"),
    "without a layer": (_shortened, "no tensor backbone.layers.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_user_changed_is_refused_before_it_is_touched(
    change: str, dense: Checkpoint
) -> None:
    make, words = CHANGES[change]
    make(dense)
    before = {name: (id(tensor), tensor._version) for name, tensor in dense.model.named_parameters()}
    for door in DOORS.values():
        with pytest.raises((TypeError, ValueError), match=words):
            door(dense)
    assert before == {name: (id(tensor), tensor._version) for name, tensor in dense.model.named_parameters()}
    assert not Path("out").exists()


class Default(AbstractContextManager[None]):
    """Sets a default of torch for a while."""

    def __init__(self, setter: Callable[[Any], Any], value: Any, old: Any) -> None:
        self._setter, self._value, self._old = setter, value, old

    def __enter__(self) -> None:
        self._setter(self._value)

    def __exit__(self, *_: object) -> None:
        self._setter(self._old)


def everything() -> tuple[dict[str, torch.Tensor], float, str, torch.Tensor]:
    """A pruned model, its loss, and what it says in the runtime."""
    checkpoint = sparsessm.load("dense")
    sparsessm.prune(checkpoint, **FAST, measure=False)
    loss = sparsessm.evaluate(checkpoint, "text.txt", length=16, limit=2).nll
    model = sparsessm.runtime.of(checkpoint)
    said = model.generate("the state", 5).text, model.logits("a model")
    return checkpoint.model.state_dict(), loss, *said


def test_what_torch_was_told_for_other_work_changes_nothing() -> None:
    tensors, loss, text, logits = everything()
    for around in (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        Default(torch.set_default_dtype, torch.float64, torch.float32),
        Default(torch.set_default_device, "meta", None),
    ):
        with around:
            told = everything()
        assert (told[1], told[2]) == (loss, text), around
        assert torch.equal(told[3], logits), around
        for name, tensor in told[0].items():
            assert torch.equal(tensor, tensors[name]), (around, name)
            assert not tensor.is_inference(), (around, name)


def test_modes_of_the_model_make_no_difference(dense: Checkpoint) -> None:
    sparsessm.prune(dense, **FAST, measure=False)
    other = sparsessm.load("dense")
    other.model.train().requires_grad_(False)
    sparsessm.prune(other, **FAST, measure=False)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, dense.model.state_dict()[name]), name


def test_two_threads_do_not_work_on_one_model(dense: Checkpoint) -> None:
    refusals: list[str] = []

    def meanwhile() -> None:
        for door in DOORS.values():
            with pytest.raises(ValueError, match="another thread is in prune with this model") as refusal:
                door(dense)
            refusals.append(str(refusal.value))

    def progress(stage: str, done: int, total: int, block: str) -> None:
        if not refusals:
            other = threading.Thread(target=meanwhile)
            other.start()
            other.join()

    sparsessm.prune(dense, progress=progress, **FAST, measure=False)
    assert len(refusals) == len(DOORS)
    for door in list(DOORS.values())[1:]:  # and when it is done the model is anybody's
        door(dense)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: untyped.prune(c, sparsity="a"), "sparsity is 'a'"),
        (lambda c: untyped.prune(c, samples=None), "samples is None"),
        (lambda c: untyped.prune(c, samples=True), "samples is True"),
        (lambda c: untyped.prune(c, length=True), "length is True"),
        (lambda c: untyped.prune(c, target=3), "target is 3"),
        (lambda c: untyped.prune(c, progress=3), "progress is 3"),
        (lambda c: untyped.prune(c, recipe="r.yaml"), "recipe is of type str"),
        (lambda c: untyped.evaluate(c, None), "data is None"),
        (lambda c: untyped.evaluate(c, length="9"), "length is '9'"),
        (lambda c: untyped.evaluate(c, limit=True), "limit is True"),
        (lambda c: untyped.evaluate(c, length=0), "length is 0"),
        (lambda c: untyped.save(c, None), "path is None"),
        (lambda c: untyped.save(c, b"out"), "path is b'out'"),
        (lambda c: untyped.save(c, "a\0b"), "path is 'a"),
        (lambda c: untyped.save(c, "caf\udce9"), "path is .* not UTF-8"),
        (lambda c: untyped.save(c, "out", {}), "report is of type dict"),
        (lambda c: untyped.save(c, "out", force="yes"), "force is 'yes'"),
        (lambda c: untyped.load(None), "source is None"),
        (lambda c: untyped.load("dense", tokenizer=3), "tokenizer is 3"),
        (lambda c: untyped.runtime.load(["dense"]), "path is "),
        (lambda c: untyped.runtime.load("dense", threads=10**20), "threads is 1000"),
        (lambda c: untyped.runtime.of(c, threads=MOST_THREADS + 1), "threads is "),
    ],
)
def test_an_argument_of_another_type_is_named(call: Any, words: str, untouched: Checkpoint) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call(untouched)


def test_a_number_of_threads_that_torch_was_told_is_checked(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparsessm.runtime.of(dense)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)  # torch would start them
    for call in (lambda: model.generate("a"), lambda: model.logits("a"), lambda: DOORS["prune"](dense)):
        with pytest.raises(ValueError, match="torch was told to use 100000 threads"):
            call()
