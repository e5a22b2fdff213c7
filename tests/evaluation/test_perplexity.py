"""evaluation/perplexity.py against the stock model and plain arithmetic."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba

from sparsessm.calibration import loss
from sparsessm.evaluation.perplexity import Perplexity, difference, perplexity

WINDOWS = torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(1))


def stock_nll(model: torch.nn.Module, window: list[int]) -> float:
    """Mean nats per predicted token: stock forward, then the definition, one token at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([window])).logits[0].double().tolist()
    total = 0.0
    for scores, target in zip(logits[:-1], window[1:], strict=True):
        top = max(scores)
        total += top + math.log(sum(math.exp(score - top) for score in scores)) - scores[target]
    return total / (len(window) - 1)


def measured(nlls: list[float], **changes: object) -> Perplexity:
    """A record with the given windows; the summary fields do not matter to `difference`."""
    record = Perplexity("text", 9 * len(nlls), len(nlls), 10, 0.0, 1.0, 1.0, 1.0, 1.0, tuple(nlls), "abc")
    return replace(record, **changes)


def test_perplexity_is_that_of_the_stock_model() -> None:
    model = pico_mamba()
    result = perplexity(model, WINDOWS, n_bytes=700, data="noise")
    expected = [stock_nll(model, window) for window in WINDOWS.tolist()]
    assert result.window_nll == pytest.approx(expected, rel=1e-5)
    nll = sum(expected) / 6
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nll * 6 * 39 / 700 / math.log(2), rel=1e-5)
    assert (result.data, result.tokens, result.windows, result.length) == ("noise", 6 * 39, 6, 40)
    assert result.low < result.perplexity < result.high


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = pico_mamba()
    model.backbone.norm_f.weight.data.zero_()  # all logits zero
    result = perplexity(model, WINDOWS, n_bytes=1)
    assert result.perplexity == pytest.approx(64, rel=1e-6)
    assert result.low == pytest.approx(64, rel=1e-6) and result.high == pytest.approx(64, rel=1e-6)


def test_windows_are_independent_and_logits_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_mamba()
    whole = perplexity(model, WINDOWS, n_bytes=1).window_nll
    turned = perplexity(model, WINDOWS.flip(0), n_bytes=1).window_nll
    assert turned[::-1] == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(loss, "ROWS", 7)
    for batch in (1, 39, 80, 161):  # one, one, two, four windows at a time
        monkeypatch.setattr(sys.modules[perplexity.__module__], "BATCH", batch)
        assert perplexity(model, WINDOWS, n_bytes=1).window_nll == pytest.approx(whole, rel=1e-6)


def test_progress_and_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[perplexity.__module__], "BATCH", 80)
    seen: list[tuple[str, int, int, str]] = []
    result = perplexity(pico_mamba(), WINDOWS[:3], n_bytes=9, progress=lambda *call: seen.append(call))
    places = ["block 1 of 2", "block 2 of 2", "head", "head"]
    done = [0, 0, 0, 2, 2, 2, 2, 3]
    assert seen == [("evaluate", *each) for each in zip(done, [3] * 8, 2 * places, strict=True)]
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["window_nll"] == list(result.window_nll) and record["perplexity"] == result.perplexity
    assert "window_nll" not in repr(result) and "perplexity=" in repr(result)


def test_one_window_has_no_interval() -> None:
    result = perplexity(pico_mamba(), WINDOWS[:1], n_bytes=9)
    assert math.isnan(result.low) and math.isnan(result.high)
    assert json.loads(json.dumps(result.record(), allow_nan=False))["low"] is None


def test_a_ruined_model_has_an_infinite_perplexity() -> None:
    model = pico_mamba(tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e5
    result = perplexity(model, WINDOWS, n_bytes=700)
    assert result.nll > 1000 and result.perplexity == result.high == math.inf
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["perplexity"] is None and record["nll"] == result.nll
    dense = perplexity(pico_mamba(), WINDOWS, n_bytes=700)
    assert difference(dense, result).mean == math.inf
    assert difference(result, dense).mean == -1
    one = perplexity(model, WINDOWS[:1], n_bytes=700)
    assert math.isnan(one.low)


def test_the_interval_does_not_depend_on_how_many_are_drawn_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nlls = [random.Random(i).gauss(3, 0.4) for i in range(30)]
    whole = difference(measured([0.0] * 30), measured(nlls))
    for drawn in (1, 30 * 7, 30 * 4000):
        monkeypatch.setattr(sys.modules[perplexity.__module__], "DRAWN", drawn)
        assert difference(measured([0.0] * 30), measured(nlls)) == whole


def test_the_interval_is_the_bootstrap_of_the_mean() -> None:
    nlls = [random.Random(5).gauss(3, 0.4) for _ in range(30)]
    nlls = [value + 0.01 * i for i, value in enumerate(nlls)]
    change = difference(measured([0.0] * 30), measured(nlls))
    source = random.Random(7)
    means = sorted(math.expm1(sum(source.choices(nlls, k=30)) / 30) for _ in range(20000))
    width = means[19500] - means[500]
    assert change.mean == pytest.approx(math.expm1(sum(nlls) / 30))
    assert change.low == pytest.approx(means[500], abs=0.08 * width)
    assert change.high == pytest.approx(means[19500], abs=0.08 * width)


@given(nlls=st.lists(st.floats(0.5, 9), min_size=2, max_size=20), shift=st.floats(-0.5, 3))
@settings(max_examples=30, deadline=None)
def test_a_constant_change_has_no_uncertainty(nlls: list[float], shift: float) -> None:
    change = difference(measured(nlls), measured([value + shift for value in nlls]))
    for value in (change.mean, change.low, change.high):
        assert value == pytest.approx(math.expm1(shift), abs=1e-6)


def test_pairing_cancels_what_the_windows_have_in_common() -> None:
    dense = measured([1.0, 5.0, 2.0, 8.0, 3.0, 6.0])
    pruned = measured([1.1, 5.12, 2.08, 8.1, 3.11, 6.09])
    change = difference(dense, pruned)
    assert 0.08 < change.low < change.mean < change.high < 0.13


@pytest.mark.parametrize("changes", [{"fingerprint": "other"}, {"length": 11}])
def test_different_windows_are_not_compared(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs the same windows"):
        difference(measured([1.0, 2.0]), measured([1.0, 2.0], **changes))


def test_real_results_on_different_windows_are_not_compared() -> None:
    model = pico_mamba()
    first, second = perplexity(model, WINDOWS[:3], 9), perplexity(model, WINDOWS[3:], 9)
    assert difference(first, first).mean == 0
    with pytest.raises(ValueError, match="needs the same windows"):
        difference(first, second)


@pytest.mark.parametrize(
    ("windows", "n_bytes", "message"),
    [
        (WINDOWS[0], 9, "int64 windows of shape"),
        (WINDOWS[:, :1], 9, "int64 windows of shape"),
        (WINDOWS[:0], 9, "int64 windows of shape"),
        (WINDOWS.int(), 9, "got torch.int32"),
        (WINDOWS, 0, "n_bytes >= 1, got 0"),
        (WINDOWS + 60, 9, "vocabulary of 64"),
    ],
)
def test_bad_windows(windows: torch.Tensor, n_bytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(pico_mamba(), windows, n_bytes)


def test_a_likelihood_that_is_not_finite_is_named() -> None:
    model = pico_mamba(tie_word_embeddings=False)
    model.backbone.embeddings.weight.data[63] = math.nan
    windows = WINDOWS.clamp(max=62)
    windows[4, 5] = 63
    with pytest.raises(ValueError, match="likelihood of window 4 is not finite"):
        perplexity(model, windows, n_bytes=9)


def test_another_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter; supported: .*mamba"):
        perplexity(torch.nn.Linear(2, 2), WINDOWS, n_bytes=9)
