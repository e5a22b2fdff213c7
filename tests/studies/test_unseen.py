"""Which windows a search sees: none that shares text with the calibration, none that is kept for the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm.studies.unseen import SEARCHED, VERIFIED, parted, touched


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(2, 20),
    tail=st.integers(0, 19),
    wide=st.integers(0, 15),
    seed=st.integers(0, 1000),
    count=st.integers(1, 5),
)
def test_a_window_is_touched_exactly_where_places_overlap(
    length: int, tail: int, wide: int, seed: int, count: int
) -> None:
    """Against the places at which windows were cut from a text of tokens that are all different."""
    random = torch.Generator().manual_seed(seed)
    whole = torch.randperm(20 * length + tail % length, generator=random)
    windows = whole[: 20 * length].view(20, length)
    size = length + wide
    starts = torch.randint(len(whole) - size + 1, (count,), generator=random)
    calibration = whole[starts[:, None] + torch.arange(size)]
    taken = {place for start in starts.tolist() for place in range(start, start + size)}
    expected = [bool(taken & set(range(n * length, (n + 1) * length))) for n in range(20)]
    assert touched(windows, calibration).tolist() == expected


def test_a_text_that_is_there_twice_is_left_out_twice() -> None:
    text = torch.randperm(64)
    windows = torch.cat([text, 100 + text, text]).view(12, 16)
    assert touched(windows, text[None, 20:30]).nonzero().flatten().tolist() == [1, 9]


@pytest.mark.parametrize("count", [4, 5, 17, 80, 1000])
def test_both_parts_are_disjoint_and_spread(count: int) -> None:
    windows = torch.randperm(count * 8).view(count, 8)
    searched, verified = (part.tolist() for part in parted(windows, None))
    assert not {*searched} & {*verified} and min(len(searched), len(verified)) >= 2
    assert len(searched) <= SEARCHED and len(verified) <= VERIFIED
    assert len(searched) + len(verified) == min(count, SEARCHED + VERIFIED)
    if count >= 17:
        for part in (searched, verified):
            assert min(part) <= count / 8 and max(part) >= count * 7 / 8


def test_calibration_windows_are_left_out_and_too_little_text_is_refused() -> None:
    windows = torch.randperm(80).view(10, 8)
    parts = parted(windows, windows[[0, 5]])
    assert not {0, 5} & {number for part in parts for number in part.tolist()}
    with pytest.raises(
        ValueError, match=r"has 10 windows of 8 tokens, of which 3 share nothing .* --samples"
    ):
        parted(windows, windows[:7])
