"""Mamba-2's scan in Triton, in its interpreter on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import forms
import pytest
import torch

programs: Any = pytest.importorskip("sparsessm.kernels.gpu.programs", reason="the extra `gpu` is missing")

# windows, length, heads, channels, groups, states
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 11, 6, 3, 3, 9),
    (1, 7, 2, 40, 1, 64),
    (1, 5, 2, 5, 2, 130),
    (2, 0, 2, 3, 1, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("every", [0, 1, 5, 100])
def test_scan(shape: tuple[int, ...], every: int) -> None:
    x = forms.ssd_inputs(shape, torch.float32, started=every != 1)
    forms.assert_ssd(programs, x, 1e-5, every)


def test_slabs_are_one_pass() -> None:
    u, delta, A, B, C, D, start = forms.ssd_inputs((2, 9, 2, 3, 1, 4), torch.float32)
    y, last = programs.ssd_scan(u, delta, A, B, C, D, start)
    parts, state = [], start
    for span in (slice(0, 4), slice(4, 9)):
        out, state = programs.ssd_scan(u[:, span], delta[:, span], A, B[:, span], C[:, span], D, state)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), y) and torch.equal(state, last)


def test_no_other_result_depends_on_every() -> None:
    x = forms.ssd_inputs((1, 9, 2, 3, 1, 4), torch.float32)
    plain, sampled = programs.ssd_scan(*x), programs.ssd_scan(*x, every=4)
    assert all(torch.equal(one, other) for one, other in zip(plain, sampled[:2], strict=True))


def test_half_precision_is_read_as_it_is() -> None:
    forms.assert_ssd(programs, forms.ssd_inputs((1, 9, 2, 3, 1, 4), torch.bfloat16), 5e-3, 4)
