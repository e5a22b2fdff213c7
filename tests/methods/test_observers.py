"""Observers: sums equal brute force, do not depend on how time is cut, and are in the units they claim."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_mamba2
from torch import Tensor
from transcription import normalise, steps_of_mamba1, steps_of_mamba2, trace
from transcription_linear import conv1d_hessians

from sparsessm.architectures import Target, adapt
from sparsessm.architectures.mixer import windows
from sparsessm.calibration import slabs
from sparsessm.calibration.walk import Stop, walk
from sparsessm.methods.observers import InputGram, InputNorm, Moments, PairMoments, StateError, StateMoments
from sparsessm.methods.patterns import NofM, Unstructured
from sparsessm.methods.sparsessm import time_weights
from sparsessm.methods.step_observers import StateEnergy, StateVote

TOKENS = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))


def a_log(stop: Stop) -> Target:
    return next(target for target in stop.block.targets if target.kind == "A_log")


def observe(make: Callable[[Tensor], Any], longest: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(slabs, "LONGEST", longest)
    stops = walk(adapt(pico_mamba()), TOKENS)
    stop = next(stops)
    target = a_log(stop)
    return stop.look(target, make(target.matrix))


# linear layers


def cut(x: Tensor, places: list[int]) -> list[Tensor]:
    """Slabs of time, some of them empty."""
    edges = [0, *sorted(places), x.shape[1]]
    return [x[:, a:b] for a, b in zip(edges, edges[1:], strict=False)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
    places=st.lists(st.integers(0, 9), max_size=3),
    seed=st.integers(0, 9999),
    single=st.booleans(),
)
def test_inputs_by_brute_force(
    shape: tuple[int, int, int], places: list[int], seed: int, single: bool
) -> None:
    """Means over all tokens of all windows, however time is cut."""
    x, dense = draw(seed, *shape), draw(seed + 1, *shape)
    x[..., -1] *= 1000
    dtype = torch.float32 if single else torch.float64
    tolerance = {"rtol": 0, "atol": 1e-5 if single else 1e-12}
    norm, plain, paired = InputNorm(), InputGram(), InputGram(paired=True)
    edges = [min(place, shape[1]) for place in places]
    for part, other in zip(cut(x.to(dtype), edges), cut(dense.to(dtype), edges), strict=True):
        norm.add(part), plain.add(part), paired.add(part, other)
    count, columns = shape[0] * shape[1], shape[2]
    gram, cross = torch.zeros(2, columns, columns, dtype=torch.float64)
    for w in range(shape[0]):
        for t in range(shape[1]):
            gram += torch.outer(x[w, t], x[w, t]) / count
            cross += torch.outer(dense[w, t], x[w, t]) / count
    norms, others = gram.diagonal().sqrt(), dense.square().mean((0, 1)).sqrt()
    power, one, two = norm.result(), plain.result(), paired.result()
    for got in (one, two):
        assert got.gram.dtype == torch.float64
        unit = torch.outer(norms, norms)
        torch.testing.assert_close(got.gram / unit, gram / unit, **tolerance)
        assert torch.equal(got.power, got.gram.diagonal())
    torch.testing.assert_close(power.power / norms**2, torch.ones_like(norms), **tolerance)
    assert power.power.dtype == torch.float64 and power.diagonal
    assert one.cross is None and two.cross is not None
    unit = torch.outer(others, norms)
    torch.testing.assert_close(two.cross / unit, cross / unit, **tolerance)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 3, 11])
def test_inputs_of_a_depthwise_layer_by_brute_force(width: int, step: int) -> None:
    """Its taps see the window so far, zeros before its beginning, whatever slab they are in."""
    mixer = adapt(pico_mamba(conv_kernel=width)).model.backbone.layers[0].mixer
    x, dense = draw(0, 2, 11, 5), draw(1, 2, 11, 5)
    norm, gram = InputNorm(), InputGram(paired=True)
    for start in range(0, 11, step):
        before = []
        for whole in (x, dense):
            past = torch.cat([whole.new_zeros(2, width - 1, 5), whole], 1)[:, start : start + width - 1]
            before.append(past if start else None)
        slab = slice(start, start + step)
        one, other = windows(mixer, x[:, slab], before[0]), windows(mixer, dense[:, slab], before[1])
        assert one.shape == (2, x[:, slab].shape[1], 5, width)
        norm.add(one), gram.add(one, other)
    want = sum(conv1d_hessians(window.T.numpy(), width) for window in x) / (2 * 22)
    # the same of x + dense and of dense hold what x_dense x' + x x_dense' is
    both = sum(conv1d_hessians(window.T.numpy(), width) for window in x + dense) / (2 * 22)
    alone = sum(conv1d_hessians(window.T.numpy(), width) for window in dense) / (2 * 22)
    got = gram.result()
    assert got.gram.shape == (5, width, width) and got.cross is not None
    np.testing.assert_allclose(got.gram, want, atol=1e-12)
    np.testing.assert_allclose(got.cross + got.cross.mT, both - want - alone, atol=1e-12)
    diagonal = np.diagonal(want, axis1=1, axis2=2)
    for power in (got.power, norm.result().power):
        assert power.shape == (5, width)
        np.testing.assert_allclose(power, diagonal, atol=1e-12)


def test_the_power_of_a_square_depthwise_layer() -> None:
    """As many channels as taps: nothing but what was asked for tells it from a Gram."""
    norm = InputNorm()
    norm.add(draw(0, 2, 5, 4, 4))
    assert torch.equal(norm.result().power, draw(0, 2, 5, 4, 4).square().sum((0, 1)) / 10)


@pytest.mark.parametrize("paired", [False, True])
def test_moments_through_a_layer(paired: bool) -> None:
    """The moments of a layer's outputs, from those of its inputs; the dense model has other weights."""
    x, dense = draw(0, 2, 30, 6), draw(1, 2, 30, 6)
    weight, other = draw(2, 3, 6), draw(3, 3, 6)
    inputs, outputs = InputGram(paired), InputGram(paired)
    inputs.add(x, dense), outputs.add(x @ weight.T, dense @ other.T)
    got, want = inputs.result().through(weight.float(), other.float()), outputs.result()
    torch.testing.assert_close(got.gram, want.gram, rtol=1e-5, atol=1e-5)
    if paired:
        torch.testing.assert_close(got.cross, want.cross, rtol=1e-5, atol=1e-5)
    else:
        assert got.cross is None
    assert got.gram.dtype == torch.float64


def test_observers_say_whether_they_want_both_models() -> None:
    assert InputGram(paired=True).paired and not InputGram().paired and not InputNorm().paired
    assert (InputNorm().result().tokens, InputGram().result().tokens) == (0, 0)  # an expert without tokens
    assert Moments(torch.eye(3)).power.tolist() == [1, 1, 1]


# A_log


@pytest.mark.parametrize("longest", [1, 7, 49])
def test_energy_does_not_depend_on_slabs(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(weight: Tensor) -> StateEnergy:
        return StateEnergy(time_weights("power:1", 50))

    whole, cut = observe(make, 50, monkeypatch), observe(make, longest, monkeypatch)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(1, 4)])
def test_votes_do_not_depend_on_slabs(pattern: Unstructured | NofM, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(weight: Tensor) -> StateVote:
        return StateVote(weight, pattern, 0.75)

    whole, cut = observe(make, 50, monkeypatch), observe(make, 7, monkeypatch)
    assert torch.equal(whole, cut)
    assert int(whole.sum()) == 50 * 256 * 3 // 4, "three of four entries get a vote at every step"


def test_error_is_in_units_of_the_residual_stream() -> None:
    """Scaling out_proj by 3 scales every error energy by 9."""
    results = []
    for scale in (1.0, 3.0):
        model = pico_mamba()
        with torch.no_grad():
            model.backbone.layers[0].mixer.out_proj.weight.mul_(scale)
        stops = walk(adapt(model), TOKENS)
        stop = next(stops)
        results.append(stop.look(a_log(stop), StateError("memoryless", diagonal=False)))
    one, three = results
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(three, name), 9 * getattr(one, name))
    assert three.signal == pytest.approx(9 * one.signal, rel=1e-6)


def test_rows_of_the_output_cost_what_they_are_said_to() -> None:
    """A weight for each coordinate of the output is out_proj with rows scaled by its square root."""
    cost = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = pico_mamba()
    got, plain = (
        stop.look(a_log(stop), StateError("unit", diagonal, cost))
        for diagonal in (False, True)
        for stop in itertools.islice(walk(adapt(model), TOKENS), 1)
    )
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.mul_(cost.sqrt()[:, None])
    stops = walk(adapt(model), TOKENS)
    stop = next(stops)
    want = stop.look(a_log(stop), StateError("unit", diagonal=False))
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=0)
    torch.testing.assert_close(plain.gram, want.gram.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=0)
    assert got.signal == pytest.approx(want.signal, rel=1e-5)


def test_diagonal_is_the_diagonal() -> None:
    stops = walk(adapt(pico_mamba()), TOKENS)
    stop = next(stops)
    full, diagonal = (stop.look(a_log(stop), StateError("unit", d)) for d in (False, True))
    torch.testing.assert_close(diagonal.gram, full.gram.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)


# states, for whole units


def state_sums(
    windows: list[tuple[np.ndarray, ...]], every: int, out_proj: np.ndarray, cost: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The five sums by their definitions, one loop for each index."""
    cost = np.ones(len(out_proj)) if cost is None else cost
    omega = np.array([(cost * column**2).sum() for column in out_proj.T])
    (_, channels, states), groups = windows[0][0].shape, windows[0][1].shape[1]
    pairs_ = (groups, states, states)
    sums = {name: np.zeros(pairs_) for name in ("gram", "states", "readouts")}
    sums |= {"energy": np.zeros((groups, states)), "full": np.zeros((groups, *[states] * 4))}
    for h, C, gain in windows:
        for t in range(every - 1, len(h), every):
            for group in range(groups):
                own = range(group * (channels // groups), (group + 1) * (channels // groups))
                pairs = sum(omega[d] * gain[t, d] ** 2 * np.outer(h[t, d], h[t, d]) for d in own)
                plain = sum(h[t, d] ** 2 for d in own)
                readouts = np.outer(C[t, group], C[t, group])
                sums["gram"][group] += readouts * pairs
                sums["energy"][group] += C[t, group] ** 2 * plain
                sums["states"][group] += pairs
                sums["readouts"][group] += readouts
                sums["full"][group] += readouts[:, :, None, None] * pairs
    return sums


STATES: list[tuple[Callable[..., Any], dict[str, Any], Callable[..., Any]]] = [
    (pico_mamba, {"state_size": 3}, steps_of_mamba1),
    (pico_mamba, {"time_step_rank": 3}, steps_of_mamba1),
    (pico_mamba2, {"n_groups": 1}, steps_of_mamba2),
    (pico_mamba2, {"n_groups": 2, "state_size": 5}, steps_of_mamba2),
]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("every", "longest"), [(1, 128), (3, 6), (16, 128), (5, 5)])
@pytest.mark.parametrize(("make", "shapes", "steps"), STATES)
def test_moments_of_states_by_an_explicit_loop(
    make: Callable[..., Any],
    shapes: dict[str, Any],
    steps: Callable[..., Any],
    every: int,
    longest: int,
    weighted: bool,
    double: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever slabs they came in; sampled at every so many steps, counted from the beginning."""
    monkeypatch.setattr(slabs, "LONGEST", longest)
    model = make(num_hidden_layers=1, **shapes)
    model = model.double() if double else model
    layer = model.backbone.layers[0]
    with torch.no_grad():
        for name in ("in_proj", "out_proj"):
            getattr(layer.mixer, name).weight.mul_(3)
    architecture = adapt(model)
    cost = draw(7, 16).square() if weighted else None
    moments = StateMoments(every, cost)
    stops = walk(architecture, TOKENS)
    stop = next(stops)
    before = stop.hidden.clone()
    stop.run({"states": moments}, until="states")
    assert torch.equal(stop.hidden, before)
    got = moments.result()
    hidden = model.backbone.embeddings(TOKENS).detach().double()
    out_proj = layer.mixer.out_proj.weight.detach().double().numpy()
    want = state_sums(
        steps(layer.mixer, hidden, layer.norm), every, out_proj, None if cost is None else cost.numpy()
    )
    for name, value in want.items():
        mine = getattr(got, name)
        assert mine.dtype == torch.float64 and mine.shape == value.shape
        assert np.abs(mine.numpy() - value).max() <= (2e-6 if double else 1e-4) * np.abs(value).max(), name


def test_many_states_have_no_full_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateMoments, "MOST_FULL", 7)
    stops = walk(adapt(pico_mamba()), TOKENS)
    stop = next(stops)
    moments = StateMoments(4)
    stop.run({"states": moments}, until="states")
    assert moments.result().full is None
    with pytest.raises(AssertionError, match="nothing was observed"):
        StateMoments(4).result()


@pytest.mark.parametrize("make", [pico_mamba, pico_mamba2])
def test_watching_the_states_changes_nothing(make: Callable[..., Any]) -> None:
    """The output of a block that is watched is that of one that is not."""
    architecture = adapt(make())
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        plain, _ = architecture.blocks[0].forward(hidden)
        watched, _ = architecture.blocks[0].forward(hidden, None, {"states": StateMoments(7)})
    torch.testing.assert_close(watched, plain, rtol=1e-6, atol=1e-6)


def test_the_sums_say_what_removing_states_costs() -> None:
    """1' gram 1 over what goes is the squared error of the block's output, out_proj'out_proj diagonal."""
    model = pico_mamba(num_hidden_layers=1).double()
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(16, 32))
    stops = walk(adapt(model), TOKENS)
    stop = next(stops)
    moments = StateMoments(1)
    stop.run({"states": moments}, until="states")
    gone = [1, 4, 5]
    cost = moments.result().gram[0][gone][:, gone].sum()
    block = stop.block
    with torch.inference_mode():
        before, _ = block.forward(stop.hidden)
        mixer.x_proj.weight[-8:][gone] = 0.0
        after, _ = block.forward(stop.hidden)
    assert before is not None and after is not None
    assert float(cost) == pytest.approx(float((before - after).square().sum()), rel=1e-6)


@pytest.mark.parametrize(("every", "longest"), [(1, 128), (3, 6), (16, 128), (1, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_pairs_by_an_explicit_loop(
    every: int, longest: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States with the decay of one and the input of another, by their recurrence."""
    monkeypatch.setattr(slabs, "LONGEST", longest)
    model = pico_mamba(num_hidden_layers=1, state_size=4, time_step_rank=3).double()
    layer = model.backbone.layers[0]
    decays, inputs = torch.tensor([0, 0, 2, 2, 1, 3, 3]), torch.tensor([0, 1, 2, 0, 1, 3, 1])
    cost = draw(7, 16).square() if weighted else None
    observer = PairMoments(every, decays, inputs, cost)
    stops = walk(adapt(model), TOKENS)
    stop = next(stops)
    stop.run({"states": observer}, until="states")
    got = observer.result()
    out_proj = layer.mixer.out_proj.weight.detach().numpy()
    omega = ((1.0 if cost is None else cost.numpy()[:, None]) * out_proj**2).sum(0)
    want = np.zeros((4, 4, 7, 7))
    for window in model.backbone.embeddings(TOKENS).detach().numpy():
        one = trace(layer.mixer, normalise(layer.norm, window))
        h = np.zeros((32, 7))
        for t in range(len(window)):
            entering = (one.delta[t] * one.u[t])[:, None] * one.B[t][inputs]
            h = one.a[t][:, decays] * h + entering
            if (t + 1) % every == 0:
                weighed = (omega * one.gate[t] ** 2)[:, None] * h
                want += np.multiply.outer(np.outer(one.C[t], one.C[t]), weighed.T @ h)
    assert got.dtype == torch.float64 and got.shape == want.shape
    assert np.abs(got.numpy() - want).max() <= 2e-6 * np.abs(want).max()
    own = PairMoments(every, torch.arange(4), torch.arange(4), cost)
    stop.run({"states": own}, until="states")
    moments = StateMoments(every, cost)
    stop.run({"states": moments}, until="states")
    full = moments.result().full
    assert full is not None
    torch.testing.assert_close(own.result(), full[0], rtol=1e-9, atol=1e-12 * float(full.abs().max()))
