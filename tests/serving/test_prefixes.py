"""Kept states: what is found is a prefix, the longest one, and never more bytes than allowed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsessm.serving.prefixes import MOST, SHORTEST, Prefixes, agreement

TEXT = st.lists(st.integers(0, 1), min_size=0, max_size=40)


def state(number: float) -> torch.Tensor:
    return torch.full((4,), float(number))


@given(TEXT, TEXT)
def test_how_far_two_texts_agree(one: list[int], other: list[int]) -> None:
    want = 0
    while want < min(len(one), len(other)) and one[want] == other[want]:
        want += 1
    assert agreement(np.array(one, dtype=np.int64), np.array(other, dtype=np.int64)) == want


@given(st.lists(st.tuples(TEXT, st.booleans()), max_size=12), TEXT)
def test_the_longest_prefix_is_found(kept: list[tuple[list[int], bool]], tail: list[int]) -> None:
    begin = [7] * SHORTEST  # all are long enough to be kept
    prefixes, known = Prefixes(1 << 20), dict[tuple[int, ...], bool]()
    for number, (ids, ends) in enumerate(kept):
        text = (*begin, *ids)
        prefixes.keep(text, state(number), torch.ones(2) if ends else None)
        known[text] = known.get(text, False) or ends
    asked = (*begin, *tail)
    usable = [text for text, ends in known.items() if text == asked[: len(text)] and (text != asked or ends)]
    found, shared = prefixes.find(asked)
    assert (tuple(found.tokens) if found else None) == (max(usable, key=len) if usable else None)
    want = max((agreement(np.array(text), np.array(asked)) for text in known), default=0)
    assert shared == want


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(0, 4000))
def test_bytes_are_bounded_and_the_last_used_stay(order: list[int], limit: int) -> None:
    prefixes, used = Prefixes(limit), list[int]()
    for number in order:
        ids = [number] * SHORTEST
        prefixes.keep(ids, state(number))
        used = [other for other in used if other != number] + [number]
        assert prefixes.nbytes <= limit
        each = 8 * SHORTEST + 16
        stay = used[len(used) - min(limit // each, len(used)) :]
        assert len(prefixes) == len(stay)
        for other in stay:  # oldest first, so that looking does not change the order
            found, _ = prefixes.find([*[other] * SHORTEST, 99])
            assert found is not None and found.array[0] == other
    assert prefixes.nbytes == len(prefixes) * (8 * SHORTEST + 16)


def test_what_is_kept_is_a_copy() -> None:
    prefixes, array = Prefixes(1 << 20), state(1)
    prefixes.keep([1] * SHORTEST, array)
    array.zero_()
    found, _ = prefixes.find([1] * SHORTEST + [2])
    assert found is not None and found.array.tolist() == [1.0] * 4


def test_short_texts_and_too_many_are_not_kept() -> None:
    prefixes = Prefixes(1 << 30)
    prefixes.keep([1] * (SHORTEST - 1), state(0))
    assert not len(prefixes) and not Prefixes(0).find([1])[0]
    for number in range(MOST + 5):
        prefixes.keep([number] * SHORTEST, state(number))
    assert len(prefixes) == MOST
