"""calibrate.py: the walk sees the pruned blocks before it, in any slab width, and names what is not
finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_mamba

from sparsessm import calibrate
from sparsessm.architectures import adapt
from sparsessm.calibrate import slab_width, survey, walk
from sparsessm.observers import StateError

TOKENS = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))


def test_inputs_come_from_the_pruned_blocks_before() -> None:
    """Against the stock forward of the model as it is left behind: its hidden states are the inputs of its
    blocks."""
    model = pico_mamba(num_hidden_layers=3)
    seen = []
    for stop in walk(adapt(model), TOKENS, passes=1):
        seen.append(stop.hidden.clone())
        target = stop.block.targets[0]
        target.replace(torch.full(target.matrix.shape, 38.0))
    for got, want in zip(seen, stock_inputs(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (seen[1] - stock_inputs(pico_mamba(num_hidden_layers=3))[1]).abs().max() > 1e-4, (
        "dense inputs differ"
    )


def stock_inputs(model: Any) -> list[torch.Tensor]:
    """What the stock forward feeds into each block."""
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.backbone.layers
    ]
    with torch.inference_mode():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("rows", [1, 7, 150, 10_000])
def test_slab_width_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for value in (calibrate.ROWS, rows):
        monkeypatch.setattr(calibrate, "ROWS", value)
        for stop in walk(adapt(pico_mamba()), TOKENS, passes=2):
            results.append(stop.seen(stop.block.targets[0], StateError("unit", diagonal=False)))
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.cross, other.cross, rtol=1e-5, atol=1e-9)
        assert one.signal == pytest.approx(other.signal, rel=1e-5)


def test_looking_changes_nothing() -> None:
    architecture = adapt(pico_mamba())
    for stop in walk(architecture, TOKENS, passes=2):
        before = stop.hidden.clone()
        stop.seen(stop.block.targets[0], StateError("memoryless", diagonal=True))
        assert torch.equal(stop.hidden, before)


def test_slabs_are_bounded() -> None:
    assert slab_width(64, 2048) * 64 == calibrate.ROWS
    assert slab_width(1, 2048) == calibrate.LONGEST
    assert slab_width(10**6, 2048) == 1
    assert slab_width(4, 10) == 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_activations_are_named(value: float) -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.embeddings.weight[TOKENS[2, 30]] = value
    first = (TOKENS == TOKENS[2, 30]).nonzero()
    window, position = min((int(w), int(t)) for w, t in first)
    slab = position // slab_width(*TOKENS.shape)
    assert slab == 0
    with pytest.raises(
        ValueError,
        match=rf"backbone.layers.0: output is not finite in calibration window {window} at token {position}",
    ):
        for _ in walk(adapt(model), TOKENS, passes=1):
            pass


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    for stop in walk(adapt(pico_mamba()), TOKENS, passes=2, progress=lambda *call: calls.append(call)):
        stop.seen(stop.block.targets[0], StateError("memoryless", diagonal=True))
    done = [call[1] for call in calls]
    assert done == list(range(1, calls[-1][2] + 1))


def test_a_survey_sees_the_dense_model_in_one_pass() -> None:
    """The same sums as a walk that changes nothing, at half the runs through the blocks."""
    calls: list[tuple[str, int, int]] = []
    seen = survey(
        adapt(pico_mamba()),
        TOKENS,
        lambda target: StateError("unit", diagonal=False) if target.layer else None,
        progress=lambda *call: calls.append(call),
    )
    [(target, got)] = list(seen)
    assert target.layer == 1
    for stop in walk(adapt(pico_mamba()), TOKENS, passes=2):
        want = stop.seen(stop.block.targets[0], StateError("unit", diagonal=False))
    torch.testing.assert_close(got.gram, want.gram)
    assert [call[1] for call in calls] == list(range(1, calls[-1][2] + 1))
