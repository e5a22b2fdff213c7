"""Choosing tokens: what each filter keeps, what ties do, and that draws follow the exact distribution."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.runtime.sampling import Sampling, candidates, choose


def logits(*probabilities: float) -> Tensor:
    """float32 logits of exactly these probabilities; 0 gives -inf."""
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def kept(scores: Tensor, **options: Any) -> list[int]:
    ids, probabilities = candidates(scores, Sampling(**{"temperature": 1.0} | options))
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    return ids.tolist()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert choose(torch.tensor([1.0, 3.0, 3.0, 2.0]), Sampling()).item() == 1
    assert choose(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), Sampling()).tolist() == [1, 0]
    ids, probabilities = candidates(torch.tensor([1.0, 3.0, 3.0]), Sampling())
    assert (ids.tolist(), probabilities.tolist()) == ([1], [1.0])


def test_top_k_keeps_exactly_k_and_of_ties_the_first() -> None:
    scores = torch.tensor([2.0, 5.0, 2.0, 7.0, 2.0, 1.0])
    assert kept(scores, top_k=1) == [3]
    assert kept(scores, top_k=3) == [3, 1, 0]
    assert kept(scores, top_k=4) == [3, 1, 0, 2]
    assert sorted(kept(scores, top_k=6)) == sorted(kept(scores, top_k=1000)) == list(range(6))
    assert kept(torch.zeros(5000), top_k=7) == list(range(7))


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    scores = logits(0.1, 0.4, 0.2, 0.3)
    assert kept(scores, top_p=1e-9) == [1]
    assert kept(scores, top_p=0.39) == [1]
    assert kept(scores, top_p=0.41) == [1, 3]
    assert kept(scores, top_p=0.69) == [1, 3]
    assert kept(scores, top_p=0.71) == [1, 3, 2]
    assert kept(scores, top_p=0.91) == [1, 3, 2, 0]
    assert sorted(kept(scores, top_p=1.0)) == [0, 1, 2, 3]


def test_top_p_that_is_reached_exactly_adds_no_token() -> None:
    assert kept(torch.zeros(4), top_p=0.5) == [0, 1]
    assert kept(torch.zeros(4), top_p=0.75) == [0, 1, 2]
    assert kept(torch.zeros(4096), top_p=0.5) == list(range(2048))  # more than are looked at first


def test_top_p_is_of_the_probabilities_among_the_k() -> None:
    scores = logits(0.4, 0.3, 0.2, 0.1)  # of the first two 4/7 and 3/7
    assert kept(scores, top_k=2, top_p=0.57) == [0]
    assert kept(scores, top_k=2, top_p=0.58) == [0, 1]


def test_top_p_is_of_the_probabilities_at_the_temperature() -> None:
    scores = logits(0.64, 0.32, 0.04)  # at temperature 0.5 squares: 0.797, 0.199, 0.003
    assert kept(scores, top_p=0.7) == [0, 1]
    assert kept(scores, top_p=0.7, temperature=0.5) == [0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=60),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 2, 5, 100]),
    st.sampled_from([None, 0.05, 0.5, 0.9, 0.999]),
)
def test_against_the_definition(
    scores: list[int], temperature: float, k: int | None, p: float | None
) -> None:
    """Plain Python, from the words of `Sampling`."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    weights = [math.exp((scores[i] - scores[order[0]]) / temperature) for i in order]
    if p is not None:
        total, running, count = sum(weights), 0.0, 0
        while running < p * total * (1 - 1e-12) and count < len(order):
            running += weights[count]
            count += 1
        order, weights = order[:count], weights[:count]
    ids, probabilities = candidates(torch.tensor(scores).float(), Sampling(temperature, k, p))
    told = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    assert told.keys() == set(order)
    for token, weight in zip(order, weights, strict=True):
        assert told[token] == pytest.approx(weight / sum(weights), rel=1e-9)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.7, top_k=5),
        Sampling(1.0, top_p=0.8),
        Sampling(1.3, top_k=9, top_p=0.7),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square of 4,000 draws against the exact probabilities."""
    scores, generator, draws = torch.randn(12, generator=seeded(5)) * 1.5, seeded(1), 4_000
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[choose(scores, sampling, generator)] += 1
    ids, probabilities = candidates(scores, sampling)
    assert int(counts[ids].sum()) == draws
    expected = probabilities * draws
    statistic = float(((counts[ids] - expected) ** 2 / expected).sum())
    freedom = len(ids) - 1
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)


def test_a_token_without_probability_is_never_drawn() -> None:
    scores = logits(0.0, 0.5, 0.0, 0.5, 0.0)
    generator = seeded()
    drawn = {int(choose(scores, Sampling(1.0), generator)) for _ in range(500)}
    assert drawn == {1, 3}


def test_temperatures_next_to_nothing_and_next_to_all() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-6, -5.0])
    assert int(choose(scores, Sampling(5e-324), seeded())) == 1
    assert int(choose(torch.tensor([3e38, -3e38]), Sampling(1e-300), seeded())) == 0
    _, probabilities = candidates(scores, Sampling(1e300))
    assert torch.allclose(probabilities, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_row_of_a_batch_gets_what_it_gets_alone() -> None:
    scores = torch.randn(4, 50, generator=seeded())
    sampling = Sampling(1.0, top_k=20, top_p=0.9)
    together = choose(scores, sampling, [seeded(i) for i in range(4)])
    assert together.tolist() == [int(choose(scores[i], sampling, seeded(i))) for i in range(4)]
    assert together.dtype == torch.int64


def test_greedy_uses_no_random_number_and_a_draw_exactly_one() -> None:
    scores, generator = torch.randn(50, generator=seeded()), seeded(3)
    before = generator.get_state()
    choose(scores, Sampling(), generator)
    assert torch.equal(before, generator.get_state())
    choose(scores, Sampling(1.0, top_p=0.5), generator)
    other = seeded(3)
    torch.rand((), generator=other, dtype=torch.float64)
    assert torch.equal(other.get_state(), generator.get_state())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 .greedy. or a finite number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; allowed: a whole number from 1, or none"),
        ({"temperature": 1.0, "top_k": -3}, "top_k is -3"),
        ({"temperature": 1.0, "top_k": 2.0}, "top_k is 2.0"),
        ({"temperature": 1.0, "top_k": True}, "top_k is True"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; allowed: 0 < top_p <= 1, or none"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p is nan"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"top_p": 0.5}, "top_p has no effect at temperature 0"),
    ],
)
def test_what_is_not_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=2)])
def test_logits_that_are_not_finite_are_refused(bad: float, sampling: Sampling) -> None:
    with pytest.raises(ValueError, match="the logits are NaN or infinite"):
        choose(torch.tensor([0.0, bad, 1.0]), sampling, seeded())
    with pytest.raises(ValueError, match="the logits are NaN or infinite"):
        choose(torch.full((3,), -math.inf), sampling, seeded())


def test_every_sequence_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 sequences"):
        choose(torch.zeros(2, 3), Sampling(1.0), seeded())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8, top_k=50), Sampling(0.8, top_k=50, top_p=0.9)]
)
def test_a_choice_takes_well_below_a_millisecond(sampling: Sampling) -> None:
    scores, generator = torch.randn(50280, generator=seeded()) * 3, seeded()
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        choose(scores, sampling, generator)
        times.append(time.perf_counter() - begun)
    assert min(times) < 1e-3
