"""methods/patterns.py: exact counts, tie rule, N:M with N kept, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transcription import remove_smallest

from sparsessm.methods.patterns import AXES, NofM, Structured, Unstructured, parse


@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 12),
    sparsity=st.floats(0, 0.999),
    levels=st.integers(1, 50),
    seed=st.integers(0, 9999),
)  # few levels: many ties
def test_unstructured_equals_a_stable_sort(
    rows: int, columns: int, sparsity: float, levels: int, seed: int
) -> None:
    score = torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    keep = Unstructured().keep(score, sparsity)
    want = remove_smallest(score.numpy(), round(sparsity * score.numel()))
    assert np.array_equal(keep.numpy(), want)


@settings(deadline=None)
@given(
    nm=st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 9999),
)
def test_n_of_m_keeps_the_n_largest_of_every_m(nm: tuple[int, int], rows: int, seed: int) -> None:
    n, m = nm
    score = torch.randint(3, (rows, 3 * m), generator=torch.Generator().manual_seed(seed)).float()
    keep = NofM(n, m).keep(score)
    assert (keep.unflatten(-1, (-1, m)).sum(-1) == n).all()
    for row in range(rows):
        for start in range(0, 3 * m, m):
            want = remove_smallest(score[row, start : start + m].numpy(), m - n)
            assert np.array_equal(keep[row, start : start + m].numpy(), want)


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
def test_leading_axes_are_independent(pattern: Unstructured | NofM) -> None:
    score = torch.rand(5, 3, 8, generator=torch.Generator().manual_seed(0))
    keep = pattern.keep(score, 0.5)
    assert all(torch.equal(keep[i], pattern.keep(score[i], 0.5)) for i in range(5))


def test_nothing_removed_and_infinite_scores() -> None:
    score = torch.tensor([[1.0, torch.inf], [torch.inf, 0.0]])
    assert Unstructured().keep(score, 0.0).all()
    assert Unstructured().keep(score, 0.5).tolist() == [[False, True], [True, False]]
    assert NofM(1, 2).keep(score).tolist() == [[False, True], [True, False]]


def test_parse() -> None:
    assert parse("unstructured") == Unstructured()
    assert parse("2:4") == NofM(2, 4)
    assert [str(parse(text)) for text in ("unstructured", "1:4")] == ["unstructured", "1:4"]
    assert NofM(1, 4).sparsity == 0.75


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2/4", "structure", "", "-1:4", "2:4:8"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="unknown pattern .*'N:M' with 0 < N < M"):
        parse(text)


def test_m_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="pattern 2:4: 4 does not divide the row length 6"):
        NofM(2, 4).keep(torch.rand(2, 6))


def test_groups_for_elimination() -> None:
    assert Unstructured().groups(16) == (16, 16)
    assert NofM(1, 4).groups(16) == (4, 3)


# whole units

SHARES = st.floats(1e-6, 1, exclude_max=True).map(lambda share: float(f"{share:.6g}")).filter(lambda x: x < 1)


@settings(deadline=None)
@given(
    axes=st.permutations(AXES),
    count=st.integers(0, 4),
    shares=st.lists(SHARES, min_size=4, max_size=4),
    bare=st.booleans(),
)
def test_structured_there_and_back(axes: list[str], count: int, shares: list[float], bare: bool) -> None:
    pairs = list(zip(axes[:count], shares, strict=False))
    pattern = Structured(((axes[0], None),)) if bare else Structured(tuple(pairs))
    assert parse(str(pattern)) == pattern
    assert pattern.mixed == (count > 0 and not bare)


def test_structured_by_its_words() -> None:
    assert parse("structured") == Structured() and str(Structured()) == "structured"
    assert parse("structured:state") == Structured((("state", None),))
    mix = parse("structured:state=0.5,block=.25")
    assert mix == Structured((("state", 0.5), ("block", 0.25)))
    assert str(mix) == "structured:state=0.5,block=0.25"
    assert not Structured().mixed and not Structured((("state", None),)).mixed


@pytest.mark.parametrize(
    "text",
    [
        "structured:", "structured:states", "structured:state,state", "structured:state=0.5,state=0.5",
        "structured:state=0", "structured:state=1", "structured:state=-0.5", "structured:state=nan",
        "structured:state=", "structured:state=half", "structured:=0.5", "structured:state=0.5,",
        "structured:state, block=0.5", "structured:state=0.5=0.5", "structured:state=inf",
    ],
)  # fmt: skip
def test_structured_refuses(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"pattern '{text}': .* is not an axis; known: state, channel, head, block"
    ):
        parse(text)


@pytest.mark.parametrize(
    "text", ["structured:state,block", "structured:state=0.5,block", "structured:head,block=0.1"]
)
def test_several_axes_need_a_share_each(text: str) -> None:
    with pytest.raises(ValueError, match="give each of several axes a share, as in 'state=0.5,block=0.1'"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["structure", "structuredstate", "Structured", " structured", "unstructured:state"]
)
def test_what_only_looks_structured_is_unknown(text: str) -> None:
    with pytest.raises(ValueError, match="unknown pattern .*'structured:AXIS' .state, channel, head, block"):
        parse(text)


@settings(deadline=None)
@given(units=st.integers(1, 12), rows=st.integers(1, 4), seed=st.integers(0, 9999), data=st.data())
def test_exactly_so_many_units_of_every_row_go(units: int, rows: int, seed: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, units))
    score = torch.randint(3, (rows, units), generator=torch.Generator().manual_seed(seed)).double()
    score[score == 2] = torch.inf  # what an elimination says of those that stay
    keep = Structured().keep(score, removed)
    for row in range(rows):
        assert np.array_equal(keep[row].numpy(), remove_smallest(score[row].numpy(), removed))
