"""What bits and a size mean for a model: which matrices take part, and that the file has the size."""

from __future__ import annotations

from pathlib import Path

import pytest
from lively import mamba

import sparsessm
from sparsessm.architectures import adapt
from sparsessm.recipe.aims import OUTER, aimed, bits_of, outer_share
from sparsessm.recipe.recipe import Recipe


def resolved(**fields: object) -> Recipe:
    return Recipe(**fields).resolved(model="m", trained_length=21)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", [7, 700])
def test_a_large_embedding_takes_part(tied: bool, words: int) -> None:
    model = mamba(vocab_size=words, tie_word_embeddings=tied)
    architecture = adapt(model)
    parameters = {id(p): p.numel() for p in model.parameters()}
    outer = {id(m.weight): m.weight.numel() for m in (model.lm_head, model.get_input_embeddings())}
    share = sum(outer.values()) / sum(parameters.values())
    assert outer_share(architecture) == pytest.approx(share)
    target = aimed(resolved(bits=4), architecture).target
    assert target == ("matrices" if share > OUTER else "projections")
    assert target == ("matrices" if words == 700 else "projections")
    for asked in ("projections", "head", "matrices"):
        assert aimed(resolved(bits=4, target=asked), architecture).target == asked


def test_what_asks_for_no_bits_stays() -> None:
    for recipe in resolved(grid="int4"), resolved(sparsity=0.5):
        assert aimed(recipe, adapt(mamba())) is recipe


@pytest.mark.parametrize(("size", "target"), [("950KB", "matrices"), ("2.6MiB", "projections")])
@pytest.mark.usefixtures("little_library", "short_builtins")
def test_the_file_has_the_size(size: str, target: str, tmp_path: Path) -> None:
    checkpoint = sparsessm.load("builtin:pycode")
    how = {"target": target, "samples": 2, "length": 128}
    report = sparsessm.prune(checkpoint, size=size, measure=False, **how)
    assert report.recipe["bits"] and "size" not in report.recipe
    out = sparsessm.save(checkpoint, tmp_path / "out", report)
    asked = {"950KB": 950e3, "2.6MiB": 2.6 * 2**20}[size]
    assert (out / "packed.safetensors").stat().st_size == pytest.approx(asked, rel=0.01)


def test_a_size_that_cannot_be() -> None:
    architecture = adapt(mamba(vocab_size=700))
    for size in ("1KB", "3GiB"):
        with pytest.raises(
            ValueError,
            match=rf"size is {size}, which is .* bits a weight in target 'matrices'; .* take \S+MB to \S+MB",
        ):
            aimed(resolved(size=size), architecture)
    with pytest.raises(ValueError) as told:
        aimed(resolved(size="1TB"), architecture)
    low, high = str(told.value).split("can take ")[1].split(" (")[0].split(" to ")
    for size, bits in ((low, 1.5), (high, 9.0)):
        assert bits_of(size, resolved(bits=4, target="matrices"), architecture) == pytest.approx(
            bits, rel=0.02
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "much"}, "size is 'much'; allowed: a size such as 6GB or 512MiB"),
        ({"size": "1GB", "bits": 3}, "size is 1GB, but bits 3 already says how many"),
        ({"size": "1GB", "grid": "int4"}, "size is 1GB, but grid 'int4' already says how many"),
        ({"size": "1GB", "sparsity": 0.5}, "sparsity is 0.5, but with size 1GB zeros are found"),
        ({"size": "1GB", "allocation": "uniform"}, "allocation 'uniform' has no effect with size 1GB"),
        (
            {"size": "1GB", "pattern": "structured:state"},
            "size has no effect with pattern 'structured:state'",
        ),
        (
            {"size": "1GB", "rules": [{"targets": ["in_proj"]}]},
            "size is 1GB, which is for a recipe without rules",
        ),
        ({"size": "1GB", "samples": "auto"}, "samples 'auto' compares masks"),
    ],
)
def test_what_does_not_go_with_a_size(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match="^" + words.replace("'", "['\"]")):
        Recipe(**fields)


def test_one_takes_the_place_of_the_other() -> None:
    assert Recipe(size="1GB").updated(bits=3).size is None
    assert Recipe(bits=3).updated(size="1GB").bits is None
    assert Recipe(size="1GB").updated(sparsity=0.5).size is None
