"""What `prune` measures on before and after: how many windows, how long, and what is said of few."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pico import TEXT, pico_mamba, pico_tokenizer

from sparsessm.architectures import adapt
from sparsessm.checkpoint import Checkpoint
from sparsessm.data.texts import evaluation_windows
from sparsessm.evaluation.before_after import WINDOWS, Yardstick, compared
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import ENOUGH, Report


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("yardstick") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(TEXT.split(), k=20_000)))
    return str(path)


def checkpoint(trained_length: int | None = None) -> Checkpoint:
    return Checkpoint(pico_mamba(), pico_tokenizer(), "pico", "transformers", {}, trained_length)


@pytest.mark.parametrize(
    ("length", "trained_length", "expected"),
    [
        (None, None, (16, 1024)),
        (None, 2048, (16, 1024)),
        (None, 1024, (16, 1024)),
        (None, 700, (16, 700)),
        (None, 10**30, (16, 1024)),
        (512, 2048, (16, 512)),
        (1025, None, (16, 1024)),
        (4096, None, (16, 1024)),
        (4096, 256, (16, 1024)),
    ],
)
def test_a_default_measurement_has_16_windows_of_at_most_1024_tokens(
    text: str, length: int | None, trained_length: int | None, expected: tuple[int, int]
) -> None:
    yardstick = Yardstick.of(checkpoint(trained_length), Recipe(data=text, length=length), WINDOWS)
    assert tuple(yardstick.windows.shape) == expected


def test_default_windows_are_enough_for_their_interval() -> None:
    assert WINDOWS >= ENOUGH


def test_windows_are_spread_over_the_text(text: str) -> None:
    every, _ = evaluation_windows(text, pico_tokenizer(), length=512)
    assert len(every) > 64
    windows = Yardstick.of(checkpoint(), Recipe(data=text, length=512), WINDOWS).windows
    places = [next(i for i, one in enumerate(every) if torch.equal(one, window)) for window in windows]
    assert places[0] == 0 and places[-1] == len(every) - 1
    steps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("windows", [1, 2, 15, 16, 17])
def test_a_short_text_gives_fewer_windows_and_few_ones_are_named(tmp_path: Path, windows: int) -> None:
    tokenizer = pico_tokenizer()
    ids = tokenizer(TEXT * 40)["input_ids"]
    length = len(ids) // 17 - 1
    path = tmp_path / "short.txt"
    path.write_text(tokenizer.decode(ids[: windows * length + length // 2]))
    yardstick = Yardstick.of(checkpoint(), Recipe(data=str(path), length=length), WINDOWS)
    windows = min(windows, WINDOWS)
    assert len(yardstick.windows) == windows

    dense = yardstick.measure(adapt(checkpoint().model))
    other = pico_mamba()
    other.backbone.layers[0].mixer.out_proj.weight.data.zero_()
    result = compared(dense, perplexity(other, yardstick.windows, yardstick.n_bytes, data=str(path)))
    report = Report({"data": "stdlib"}, [], fingerprint="", seconds=0.0, perplexity=result)
    assert bool(report.caveat()) == (windows < ENOUGH)
    assert ("intervals from fewer" in report.caveat()) == (1 < windows < ENOUGH)
    assert set(result["difference"]) == {"mean", "low", "high"}
    for record in (result["dense"], result["pruned"]):
        assert (record["windows"], record["length"]) == (windows, length)
        assert record["tokens"] == windows * (length - 1)
        assert (record["low"] is None) == (windows == 1)


def test_perplexity_of_a_large_vocabulary_is_that_of_stock_logits_in_float64() -> None:
    model = pico_mamba(vocab_size=5003)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)  # sharp predictions: log-likelihoods from near 0 to -100
        windows = torch.randint(5003, (3, 401), generator=torch.Generator().manual_seed(3))
        logits = model(windows).logits.double()
    found = perplexity(model, windows, n_bytes=1).window_nll
    pairs = zip(logits, windows, strict=True)
    expected = [float(F.cross_entropy(scores[:-1], window[1:])) for scores, window in pairs]
    assert found == pytest.approx(expected, rel=1e-5)
