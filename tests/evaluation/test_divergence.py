"""evaluation/divergence.py against stock models, and against sums that are written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico import pico_mamba, pico_mamba2
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.evaluation import divergence
from sparsessm.evaluation.divergence import Compared, compare, histogram, perplexities, pieces, worst
from sparsessm.evaluation.perplexity import difference, perplexity

WINDOWS = torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(1))


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other weights in its first layer."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = model.get_parameter("backbone.layers.0.mixer.in_proj.weight")
        weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return model


@pytest.fixture(scope="module", params=[pico_mamba, pico_mamba2])
def models(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    return request.param(), disturbed(request.param())


def probabilities(model: torch.nn.Module) -> Tensor:
    """(W, L - 1, vocabulary) float64, by the stock forward."""
    with torch.no_grad():
        return torch.softmax(model(WINDOWS).logits[:, :-1].double(), -1)


def test_losses_and_kl_are_those_of_the_stock_models(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    steps: list[tuple[int, int]] = []
    found = compare(
        *map(adapt, models), WINDOWS, progress=lambda _, done, total, place: steps.append((done, total))
    )
    p, q = map(probabilities, models)
    right = WINDOWS[:, 1:, None]
    torch.testing.assert_close(found.before, -p.gather(-1, right)[..., 0].log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.after, -q.gather(-1, right)[..., 0].log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.kl, (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-7)
    assert torch.equal(found.same, p.argmax(-1) == q.argmax(-1)) and not found.same.all()
    assert steps[-1] == (12, 12)


def test_perplexities_are_those_that_eval_measures(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    told = perplexities(compare(*map(adapt, models), WINDOWS), WINDOWS, 700, "noise")
    dense, pruned = (perplexity(model, WINDOWS, n_bytes=700, data="noise") for model in models)
    for record, alone in ((told["dense"], dense), (told["pruned"], pruned)):
        for name in ("perplexity", "low", "high", "bits_per_byte"):
            assert record[name] == pytest.approx(getattr(alone, name), rel=1e-5)
        assert record["fingerprint"] == alone.fingerprint
    assert told["difference"]["mean"] == pytest.approx(difference(dense, pruned).mean, rel=1e-3)


def test_a_model_beside_itself_loses_nothing() -> None:
    found = compare(adapt(pico_mamba()), adapt(pico_mamba()), WINDOWS)
    assert not found.kl.any() and found.same.all() and torch.equal(found.before, found.after)
    assert worst(found, WINDOWS, lambda tokens: "x" * len(tokens)) == []


def test_vocabularies_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabularies of 64 and 80 tokens"):
        compare(adapt(pico_mamba()), adapt(pico_mamba(vocab_size=80)), WINDOWS)


def made(lost: list[list[float]], kl: list[list[float]] | None = None) -> Compared:
    after = torch.tensor(lost, dtype=torch.float64) + 1
    divergence = torch.zeros_like(after) if kl is None else torch.tensor(kl, dtype=torch.float64)
    return Compared(torch.ones_like(after), after, divergence, divergence == 0, ("float32", "float32"))


def test_the_histogram_counts_every_token_once() -> None:
    kl = [[0.0, 1e-6, 1.01e-5, 0.02], [0.02, 0.5, 3.0, 99.0]]
    told = histogram(made(kl, kl))
    assert sum(told["counts"]) == told["tokens"] == 8
    by_hand = [0] * len(told["edges"])
    for value in (value for line in kl for value in line):
        by_hand[max(place for place, edge in enumerate(told["edges"]) if edge <= value)] += 1
    assert told["counts"] == by_hand
    assert told["mean"] == pytest.approx(sum(map(sum, kl)) / 8)
    assert (told["median"], told["p99"], told["most"], told["same"]) == (0.02, 99.0, 99.0, 1 / 8)
    assert told["low"] <= told["mean"] <= told["high"] and math.isfinite(told["edges"][-1])


def test_the_worst_windows_and_the_stretch_that_lost_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "STRETCH", 2)
    monkeypatch.setattr(divergence, "SHOWN", 2)
    lost = [[0.0, 0.0, 0.0, 0.1], [9.0, -1.0, 5.0, 5.0], [-1.0, -1.0, -1.0, -1.0], [0.0, 2.0, 1.0, 0.0]]
    windows = torch.arange(20).view(4, 5)
    told = worst(made(lost), windows, lambda tokens: "".join(f"{token}." for token in tokens))
    assert [(one["index"], one["start"]) for one in told] == [(1, 3), (3, 2)]
    assert told[0]["tokens"] == [["8.", 5.0], ["9.", 5.0]]
    assert told[0]["worst"] == [["6.", 1.0, 10.0], ["8.", 1.0, 6.0]]
    assert (told[0]["lost"], told[0]["before"], told[0]["after"]) == (4.5, 1.0, 5.5)


@given(st.text(max_size=20))
def test_pieces_of_bytes_come_to_the_whole_text(text: str) -> None:
    content = text.encode()

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    assert "".join(pieces([*content], decode)) == text
    assert len(pieces([*content], decode)) == len(content)


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    content = "a\u20acb".encode()
    assert pieces([*content], lambda t: bytes(t).decode(errors="replace")) == ["a", "", "", "\u20ac", "b"]
