"""Allocation: the threshold against brute force, the published rules against their transcriptions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transcription_linear import hessian_trace_ratios, owl_ratios
from transcription_linear import outlier_ratio as outliers_of_the_paper

from sparsessm.methods import allocation
from sparsessm.methods.allocation import (
    ALLOCATIONS,
    Profile,
    by_threshold,
    hessian_trace,
    outlier_ratio,
    owl,
    parse,
)

FEW = st.lists(st.integers(0, 6), min_size=1, max_size=6)  # small numbers: ties are common


def profiles(lists: list[list[int]]) -> list[Profile]:
    return [Profile.of(torch.tensor(scores, dtype=torch.float64)) for scores in lists]


def limits(size: int, sparsity: float, clip: float) -> tuple[int, int]:
    return round(max(sparsity - clip, 0) * size), round(min(sparsity + clip, 1) * size)


@settings(max_examples=200, deadline=None)
@given(st.lists(FEW, min_size=1, max_size=4), st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_nothing_cheaper_could_have_been_removed(
    lists: list[list[int]], sparsity: float, clip: float
) -> None:
    """Of all ways to remove as many under the clip, by trying them all."""
    shares = by_threshold(profiles(lists), sparsity, clip)
    counts = [share * len(scores) for share, scores in zip(shares, lists, strict=True)]
    assert counts == pytest.approx([round(count) for count in counts])
    counts = [round(count) for count in counts]
    choices = [limits(len(scores), sparsity, clip) for scores in lists]
    assert all(low <= count <= high for count, (low, high) in zip(counts, choices, strict=True))
    asked = sparsity * sum(map(len, lists))
    reachable = min(max(asked, sum(low for low, _ in choices)), sum(high for _, high in choices))
    assert abs(sum(counts) - reachable) <= 0.5 + 1e-6

    def cost(counts: tuple[int, ...]) -> int:
        return sum(sum(sorted(scores)[:count]) for scores, count in zip(lists, counts, strict=True))

    ways = product(*(range(low, high + 1) for low, high in choices))
    assert cost(tuple(counts)) == min(cost(way) for way in ways if sum(way) == sum(counts))


def test_one_threshold_without_a_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) ** power for n, power in ((700, 1), (300, 3), (500, 0.5))]
    shares = by_threshold([Profile.of(score) for score in scores], 0.4, 1.0)
    edge = torch.cat(scores).sort().values[599]
    expected = [float((score <= edge).double().mean()) for score in scores]
    assert shares == pytest.approx(expected)
    assert sum(round(share * len(score)) for share, score in zip(shares, scores, strict=True)) == 600


def test_a_clip_keeps_every_share_near_and_the_rest_pays() -> None:
    cheap, dear, plain = torch.zeros(1000), torch.full((1000,), 9.0), torch.linspace(0, 1, 1000)
    scores = [Profile.of(score) for score in (cheap, dear, plain)]
    assert by_threshold(scores, 0.5, 0.1) == pytest.approx([0.6, 0.4, 0.5])
    assert by_threshold(scores, 0.5, 0.0) == [0.5, 0.5, 0.5]
    assert by_threshold(scores, 0.5, 1.0) == pytest.approx([1.0, 0.0, 0.5], abs=1e-3)
    assert by_threshold(scores, 0.95, 0.1) == pytest.approx([1.0, 0.85, 1.0])


def test_among_equals_the_earlier_matrix_goes_first() -> None:
    assert by_threshold(profiles([[1] * 4, [1] * 4]), 0.5, 1.0) == [1.0, 0.0]
    assert by_threshold(profiles([[2, 1], [1, 1]]), 0.5, 1.0) == [0.5, 0.5]


def test_what_was_removed_before_goes_first() -> None:
    """Scores of -inf: counted, whatever the others score."""
    gone = torch.tensor([-torch.inf] * 30 + [5.0] * 70)
    shares = by_threshold([Profile.of(gone), Profile.of(torch.ones(100))], 0.25, 1.0)
    assert shares == [0.3, 0.2]


@settings(max_examples=100, deadline=None)
@example(sizes=[1, 1, 1], seed=0, sparsity=0.25, clip=0.25, sample=50, coarse=2)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    clip=st.floats(0, 1),
    sample=st.sampled_from([50, 1000, 1 << 16]),
    coarse=st.sampled_from([2, 100, 10**9]),
)
def test_the_total_is_the_one_asked_for(
    sizes: list[int], seed: int, sparsity: float, clip: float, sample: int, coarse: int
) -> None:
    """Thinned or not, with ties or not, clipped or not; up to the entries that a kept score stands for."""
    generator = torch.Generator().manual_seed(seed)
    scores = [
        (torch.randn(n, generator=generator).exp() * (i + 1) * coarse).floor() for i, n in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "SAMPLE", sample)
        made = [Profile.of(score) for score in scores]
    shares = by_threshold(made, sparsity, clip)
    assert all(0 <= share <= 1 for share in shares)
    steps = [profile.total / len(profile.scores) for profile in made]
    for share, profile, step in zip(shares, made, steps, strict=True):
        assert abs(share - sparsity) * profile.total <= clip * profile.total + step
    removed = sum(share * n for share, n in zip(shares, sizes, strict=True))
    # Where the clip is less than a step there is no freedom to make up for the rounding of each matrix.
    bound = any(clip * profile.total < step for profile, step in zip(made, steps, strict=True)) or clip < 0.01
    assert abs(removed - sparsity * sum(sizes)) <= max(steps) / 2 + (sum(steps) / 2 if bound else 1e-6)


def test_the_total_of_large_matrices_is_exact_to_a_thousandth() -> None:
    """Shapes of mamba-130m, thinned 18 to 36 times."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3072, 768), (80, 1536), (1536, 48), (768, 1536)] * 3
    scores = [torch.rand(*shape, generator=generator) * (i + 1) for i, shape in enumerate(shapes)]
    made = [Profile.of(score) for score in scores]
    assert max(len(profile.scores) for profile in made) == allocation.SAMPLE
    for sparsity, clip in ((0.3, 0.1), (0.5, 0.05), (0.7, 1.0)):
        shares = by_threshold(made, sparsity, clip)
        total = sum(profile.total for profile in made)
        removed = sum(share * profile.total for share, profile in zip(shares, made, strict=True))
        assert abs(removed / total - sparsity) < 1e-4


def test_thinning_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(n, generator=generator).abs() * scale for n, scale in ((4096, 1), (9000, 2), (333, 3))
    ]
    full = by_threshold([Profile.of(score) for score in scores], 0.5, 0.4)
    monkeypatch.setattr(allocation, "SAMPLE", 256)
    thin = [Profile.of(score) for score in scores]
    assert [len(profile.scores) for profile in thin] == [256] * 3
    assert by_threshold(thin, 0.5, 0.4) == pytest.approx(full, abs=2 / 256)


def test_a_profile_is_in_order_and_evenly_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "SAMPLE", 4)
    profile = Profile.of(torch.tensor([[7.0, 1.0, 3.0, 5.0], [0.0, 2.0, 6.0, 4.0]]))
    assert (profile.scores.tolist(), profile.total) == ([0.0, 2.0, 4.0, 6.0], 8)
    assert Profile.of(torch.tensor([2.0, -torch.inf, 1.0])).scores.tolist() == [-torch.inf, 1.0, 2.0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=9),
    st.floats(0.2, 0.8),
    st.floats(0, 0.2),
)
def test_hessian_trace_equals_the_paper(diagonals: list[list[int]], sparsity: float, alpha: float) -> None:
    powers = [torch.tensor(diagonal, dtype=torch.float64) for diagonal in diagonals]
    expected = hessian_trace_ratios(
        [2 * power.numpy() for power in powers], [3] * len(powers), sparsity, alpha
    )
    assert hessian_trace(powers, sparsity, alpha) == pytest.approx(list(expected), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.floats(0.5, 3)), min_size=1, max_size=6),
    st.floats(0.3, 0.7),
    st.floats(0, 0.15),
)
def test_owl_equals_the_authors_code(layers: list[tuple[int, float]], sparsity: float, width: float) -> None:
    scores: list[np.ndarray] = [
        np.exp(spread * np.random.default_rng(seed).standard_normal((8, 10))) for seed, spread in layers
    ]
    ratios = [outlier_ratio([torch.from_numpy(score)]) for score in scores]
    assert ratios == [outliers_of_the_paper(score, allocation.OUTLIER) for score in scores]
    expected = owl_ratios(scores, allocation.OUTLIER, width, sparsity)
    assert owl(ratios, [80] * len(layers), sparsity, width) == pytest.approx(list(expected), abs=1e-12)


def test_the_matrices_of_a_block_are_judged_together() -> None:
    parts = [torch.tensor([[1.0, 1.0], [1.0, 50.0]]), torch.tensor([1.0, 1.0, 60.0, 1.0])]
    assert outlier_ratio(parts) == 0.0  # 5 times the mean of all is 72.5
    parts = [
        part.repeat(4) for part in (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0]))
    ]
    together = torch.cat(parts).numpy()
    assert outlier_ratio(parts) == outliers_of_the_paper(together, allocation.OUTLIER) == 4 / 32


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_shares_stay_shares_and_their_mean_exact(
    blocks: list[tuple[float, int]], sparsity: float, size: float
) -> None:
    """Also where the full range would leave [0, 1], and where blocks differ in size."""
    ratios, entries = zip(*blocks, strict=True)
    shares = owl(ratios, entries, sparsity, size)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    removed = sum(share * n for share, n in zip(shares, entries, strict=True))
    assert removed == pytest.approx(sparsity * sum(entries), abs=1e-6 * sum(entries))
    for (one, a), (two, b) in product(zip(ratios, shares, strict=True), repeat=2):
        assert one == two or (one > two) == (a <= b) or a == pytest.approx(b, abs=1e-9)
    powers: list[Tensor] = [torch.tensor([ratio]) for ratio in ratios]
    shares = hessian_trace(powers, sparsity, size)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    assert sum(shares) == pytest.approx(sparsity * len(shares), abs=1e-9 * len(shares))


@pytest.mark.parametrize(
    ("text", "family", "expected"),
    [
        ("uniform", "projections", ("uniform", 0.0)),
        ("hessian-trace", "projections", ("hessian-trace", 0.04)),
        ("hessian-trace:0.1", "projections", ("hessian-trace", 0.1)),
        ("owl", "projections", ("owl", 0.08)),
        ("owl:0", "projections", ("owl", 0.0)),
        ("loss", "projections", ("loss", 0.1)),
        ("loss", "ssm", ("loss", 1.0)),  # layers differ too much in their A_log for a clip
        ("loss:0.25", "ssm", ("loss", 0.25)),
        ("loss:1", "head", ("loss", 1.0)),
    ],
)
def test_parse(text: str, family: str, expected: tuple[str, float]) -> None:
    row, number = parse(text, family)
    assert (row.name, number) == expected


@pytest.mark.parametrize(
    "text",
    ["", "los", "uniform:0.1", "owl:x", "owl:-0.1", "loss:1.1", "loss:nan", "loss:inf", "owl:0.1:2", ":1"],
)
def test_what_is_no_allocation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^allocation is '.*'; allowed: uniform, hessian-trace") as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert all(name in str(caught.value) for name in ALLOCATIONS)
