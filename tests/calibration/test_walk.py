"""The walk sees what the stock forward of the model as pruned so far computes, in any slab
width, in as few passes as it says; what is not finite is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_mamba
from stock import stock_inputs
from torch import Tensor, nn

from sparsessm.architectures import Target, adapt
from sparsessm.architectures.stack import StackBlock
from sparsessm.calibration import slabs
from sparsessm.calibration.journal import Stream
from sparsessm.calibration.paired import Pair, Recorder
from sparsessm.calibration.progress import Steps
from sparsessm.calibration.slabs import slab_width
from sparsessm.calibration.visit import survey
from sparsessm.calibration.walk import Stop, walk
from sparsessm.methods.observers import InputGram, InputNorm, Moments, StateError

TOKENS = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))
LINEAR = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def second_moments(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Mean of other x' over all tokens (of x x' if there is no other), brute force in float64."""
    rows, others = x.flatten(0, 1), (x if other is None else other).flatten(0, 1)
    return sum(o[..., :, None] * r[..., None, :] for o, r in zip(others, rows, strict=True)) / len(rows)


def assert_same(got: Tensor | None, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got is not None and got.dtype == torch.float64 and got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def a_log(stop: Stop) -> Target:
    return next(target for target in stop.block.targets if target.kind == "A_log")


def halve(target: Target, seed: int = 0) -> None:
    """Remove a random half, and what a repair may do besides."""
    g = torch.Generator().manual_seed(seed)
    removed = next(iter(target.removed.values()))
    target.replace(target.matrix.masked_fill(torch.rand(target.matrix.shape, generator=g) < 0.5, removed))
    for companion, (parameter, _) in target.companions.items():
        target.shift(companion, torch.rand(parameter.shape, generator=g))


def stream(model: Any) -> Stream:
    return Stream("dense", [embedded(model)])


def embedded(model: Any) -> Tensor:
    with torch.inference_mode():
        return adapt(model).embed(TOKENS)


def of_kind(stop: Stop, kind: str) -> Target:
    return next(target for target in stop.block.targets if target.kind == kind)


# sequential truth


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 3, "time_step_rank": 3},
        {
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 2,
            "expand": 3,
            "tie_word_embeddings": False,
        },
    ],
)
def test_inputs_are_those_of_the_model_as_pruned_so_far(overrides: dict[str, Any]) -> None:
    """Each target sees what the stock forward feeds it with every target before it pruned, in layers before
    and in its own, A_log's removed value and D's change included; it starts from the embedding stream."""
    model = pico_mamba(**overrides)
    dense = {key: second_moments(x) for key, x in stock_inputs(model, TOKENS).items()}
    moved: dict[str, list[float]] = {}
    for stop in walk(adapt(model), TOKENS, tail=True):
        if stop.block.index == 0:
            assert torch.equal(stop.hidden, model.backbone.embeddings.weight[TOKENS])
        if stop.block.index < len(model.backbone.layers):
            torch.testing.assert_close(
                stop.hidden.double(),
                stock_inputs(model, TOKENS)[stop.block.index, "block"],
                rtol=1e-5,
                atol=1e-6,
            )
        for target in stop.block.targets:
            if target.kind != "A_log" and not target.looked_up:
                key = (-1 if target.family == "head" else target.layer, target.kind)
                want = second_moments(stock_inputs(model, TOKENS)[key])
                assert_same(stop.look(target, InputGram()).gram, want)
                assert_same(stop.look(target, InputNorm()).power, want.diagonal(dim1=-2, dim2=-1))
                difference = (want - dense[key]).abs().max() / dense[key].abs().max()
                moved.setdefault(target.kind, []).append(float(difference))
            halve(target, target.layer)
    assert moved["in_proj"][0] == 0, "nothing is before it"
    assert min([*moved.pop("in_proj")[1:], *sum(moved.values(), [])]) > 1e-3, "dense inputs are others"


@pytest.mark.parametrize("kind,before", [("x_proj", "in_proj"), ("dt_proj", "x_proj"), ("out_proj", "A_log")])
def test_another_order_shows_other_inputs(kind: str, before: str) -> None:
    moments = []
    for first in (before, None):
        stops = walk(adapt(pico_mamba(time_step_rank=3)), TOKENS)
        stop = next(stops)
        if first:
            halve(of_kind(stop, first))
        moments.append(stop.look(of_kind(stop, kind), InputGram()).gram)
    assert (moments[0] - moments[1]).abs().max() > 1e-2 * moments[0].abs().max()


def test_the_head_sees_the_final_norm_behind_the_pruned_layers() -> None:
    model = pico_mamba()
    seen = []
    for stop in walk(adapt(model), TOKENS, dense=stream(model), tail=True):
        if stop.block.index == 2:
            seen.append(stop.look(stop.block.targets[0], InputGram(paired=True)))
        else:
            halve(of_kind(stop, "out_proj"))
    dense, now = (stock_inputs(one, TOKENS)[-1, "lm_head"] for one in (pico_mamba(), model))
    assert_same(seen[0].gram, second_moments(now))
    assert_same(seen[0].cross, second_moments(now, dense))
    assert (seen[0].gram - second_moments(dense)).abs().max() > 1e-2


# two streams


@pytest.mark.parametrize("rows,longest", [(2048, 128), (60, 7), (1, 128)])
def test_cross_moments_equal_two_stock_models(
    rows: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_dense x' by brute force in float64; the dense block keeps its weights while its twin is pruned."""
    monkeypatch.setattr(slabs, "ROWS", rows)
    monkeypatch.setattr(slabs, "LONGEST", longest)
    model = pico_mamba(time_step_rank=3).double()
    dense = stock_inputs(model, TOKENS)
    for stop in walk(adapt(model), TOKENS, dense=stream(model), tail=True):
        if stop.block.index < 2:
            assert_same(stop.dense_hidden, dense[stop.block.index, "block"], 1e-6)
        for target in stop.block.targets:
            if target.kind != "A_log":
                key = (-1 if target.family == "head" else target.layer, target.kind)
                now = stock_inputs(model, TOKENS)[key]
                got = stop.look(target, InputGram(paired=True))
                assert_same(got.gram, second_moments(now), 1e-6)  # the stock norm computes in float32
                assert_same(got.cross, second_moments(now, dense[key]), 1e-6)
                if target.layer:
                    assert (got.cross - got.gram).abs().max() > 1e-3 * got.gram.abs().max()
            halve(target, target.layer)


def test_what_wants_one_stream_gets_one() -> None:
    model = pico_mamba()
    stops = walk(adapt(model), TOKENS, dense=stream(model))
    stop = next(stops)
    assert stop.look(stop.block.targets[0], InputGram()).cross is None
    stops = walk(adapt(model), TOKENS)
    alone = next(stops)
    assert alone.dense is None and alone.dense_hidden is None


def test_a_pair_hands_over_both_inputs() -> None:
    class Both:
        paired, options = True, {}

        def __init__(self) -> None:
            self.what: list[tuple[Any, ...]] = []

        def add(self, *what: Any) -> None:
            self.what.append(what)

    observer = Both()
    pair = Pair(observer)
    assert isinstance(pair.dense, Recorder) and pair.options == pair.dense.options == {}
    for step in range(2):
        pair.dense.add(torch.tensor(step + 10))
        pair.add(torch.tensor(step))
    assert [(int(x), int(dense)) for x, dense in observer.what] == [(0, 10), (1, 11)]


# moments that need no pass


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
    """The (layer, until) of every call of a block's forward."""
    calls: list[tuple[int, str | None]] = []
    forward = StackBlock.forward

    def counted(
        self: Any, hidden: Tensor, state: Any = None, taps: Any = None, until: Any = None, kept: Any = None
    ) -> Any:
        calls.append((self.index, until))
        return forward(self, hidden, state, taps, until, kept)

    monkeypatch.setattr(StackBlock, "forward", counted)
    return calls


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_moments_that_follow_equal_a_look(paired: bool, pruned: bool, passes: list[Any]) -> None:
    """dt_proj's from those of x_proj, in both streams, after x_proj was pruned."""
    model = pico_mamba(time_step_rank=3).double()
    for stop in walk(adapt(model), TOKENS, dense=stream(model) if paired else None):
        halve(of_kind(stop, "in_proj"))
        stop.look(of_kind(stop, "x_proj"), InputGram(paired))
        if pruned:
            halve(of_kind(stop, "x_proj"), seed=1)
        passes.clear()
        followed = stop.look(of_kind(stop, "dt_proj"), InputGram(paired))
        assert not passes
        observer = InputGram(paired)
        stop.run({"dt_proj": observer}, until="dt_proj")
        looked = observer.result()
        assert len(passes) == 1 + paired
        assert_same(followed.gram, looked.gram, 1e-10)
        if paired:
            assert_same(followed.cross, looked.cross, 1e-10)
            assert not torch.allclose(followed.cross, followed.gram, rtol=1e-3)
        else:
            assert followed.cross is None and looked.cross is None


def test_moments_that_do_not_follow_are_looked_at(passes: list[Any]) -> None:
    model = pico_mamba(time_step_rank=3)
    with torch.no_grad():
        bias = model.backbone.layers[1].mixer.x_proj
        bias.bias = nn.Parameter(torch.ones(bias.out_features))

    def looks(stop: Stop, before: str, watched: Any, observer: Any) -> int:
        stop.look(of_kind(stop, before), watched)
        passes.clear()
        got = stop.look(of_kind(stop, "dt_proj"), observer)
        assert isinstance(got, Moments) and got.power.shape == (3,)
        return sum(until == "dt_proj" for _, until in passes)

    first, second = walk(adapt(model), TOKENS, dense=stream(model)), walk(adapt(model), TOKENS)
    stop = next(first)
    assert looks(stop, "x_proj", InputGram(), InputGram()) == 0
    assert looks(stop, "x_proj", InputGram(paired=True), InputGram()) == 0
    assert looks(stop, "x_proj", InputGram(), InputGram(paired=True)) == 2, "both streams"
    assert looks(stop, "x_proj", InputNorm(), InputGram()) == 1
    assert looks(stop, "x_proj", InputGram(), InputNorm()) == 1
    assert looks(stop, "in_proj", InputGram(), InputGram()) == 1
    next(second)
    assert looks(next(second), "x_proj", InputGram(), InputGram()) == 1, "x_proj adds a bias"


@pytest.mark.parametrize("paired", [False, True])
def test_each_target_costs_one_pass_up_to_it_and_one_through_the_block(
    paired: bool, passes: list[Any]
) -> None:
    """dt_proj costs none, the last block is not run again, the second stream runs where it is looked at."""
    model = pico_mamba()
    progress: list[tuple[str, int, int, str]] = []
    told = lambda *call: progress.append(call)  # noqa: E731
    dense = stream(model) if paired else None
    for stop in walk(adapt(model), TOKENS, dense=dense, steps=Steps("calibrate", 11, told)):
        for kind in ["in_proj", "x_proj", "dt_proj", "A_log", "out_proj"]:
            state = StateError("unit", diagonal=True)
            stop.look(of_kind(stop, kind), state if kind == "A_log" else InputGram(paired))
            halve(of_kind(stop, kind))
    looks = ["in_proj", "x_proj", "A_log", "out_proj"]
    if paired:  # the look at out_proj takes the dense stream through the block
        looks = ["in_proj", "in_proj", "x_proj", "x_proj", "A_log", None, "out_proj"]
    assert passes == [(i, until) for i in range(2) for until in [*looks, None]][:-1]
    assert [call[1] for call in progress] == list(range(1, progress[-1][2] + 1))


def test_passes_are_cut_into_slabs(passes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "LONGEST", 20)  # 20, 20 and 10
    progress: list[tuple[str, int, int, str]] = []
    told = lambda *call: progress.append(call)  # noqa: E731
    for stop in walk(adapt(pico_mamba()), TOKENS, tail=True, steps=Steps("calibrate", 21, told)):
        if stop.block.index == 2:
            stop.look(stop.block.targets[0], InputGram())
        else:
            stop.look(of_kind(stop, "x_proj"), InputGram()), stop.look(of_kind(stop, "dt_proj"), InputGram())
    assert passes == [(i, until) for i in range(2) for until in ["x_proj"] * 3 + [None] * 3]
    assert [call[1] for call in progress] == list(range(1, progress[-1][2] + 1)) and progress[-1][2] == 21


# slabs


@pytest.mark.parametrize("rows", [1, 7, 150, 10_000])
def test_slab_width_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results, moments = [], []
    for value in (slabs.ROWS, rows):
        monkeypatch.setattr(slabs, "ROWS", value)
        model = pico_mamba()
        for stop in walk(adapt(model), TOKENS, dense=stream(model)):
            results.append(stop.look(a_log(stop), StateError("unit", diagonal=False)))
            for kind in ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]:
                moments.append(stop.look(of_kind(stop, kind), InputGram(paired=True)))
            halve(of_kind(stop, "out_proj"))
    for one, other in zip(moments[:10], moments[10:], strict=True):
        assert_same(other.gram, one.gram)
        assert other.cross is not None and one.cross is not None
        assert_same(other.cross, one.cross)
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.cross, other.cross, rtol=1e-5, atol=1e-9)
        assert one.signal == pytest.approx(other.signal, rel=1e-5)


def test_looking_changes_nothing() -> None:
    architecture = adapt(pico_mamba())
    for stop in walk(architecture, TOKENS):
        before = stop.hidden.clone()
        stop.look(a_log(stop), StateError("memoryless", diagonal=True))
        for kind in LINEAR:
            stop.look(of_kind(stop, kind), InputGram())
        assert torch.equal(stop.hidden, before)


def test_slabs_are_bounded() -> None:
    assert slab_width(2048) * slabs.FEWEST == slabs.ROWS
    assert slab_width(10) == 10
    assert [len(slabs.lanes(windows, 2048)) for windows in (1, 4, 5, 64)] == [1, 1, 2, 16]
    assert slabs.lanes(300, 10) == [slice(0, 204), slice(204, 300)], "short windows go together"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_activations_are_named(value: float) -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.embeddings.weight[TOKENS[2, 30]] = value
    first = (TOKENS == TOKENS[2, 30]).nonzero()
    window, position = min((int(w), int(t)) for w, t in first)
    slab = position // slab_width(TOKENS.shape[1])
    assert slab == 0
    with pytest.raises(
        ValueError,
        match=rf"backbone.layers.0: output is not finite in calibration window {window} at token {position}",
    ):
        for _ in walk(adapt(model), TOKENS):
            pass


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[str, int, int, str]] = []
    told = lambda *call: calls.append(call)  # noqa: E731
    for stop in walk(adapt(pico_mamba()), TOKENS, steps=Steps("calibrate", 3, told)):
        stop.look(a_log(stop), StateError("memoryless", diagonal=True))
    done = [call[1] for call in calls]
    assert done == list(range(1, calls[-1][2] + 1))


def test_a_survey_sees_the_dense_model_in_one_pass(passes: list[Any]) -> None:
    """The same sums as a walk that changes nothing, every target in the same run through its block."""
    calls: list[tuple[str, int, int, str]] = []

    def watch(target: Target) -> Any | None:
        if target.kind == "A_log":
            return StateError("unit", diagonal=False) if target.layer else None
        return InputNorm() if target.kind == "x_proj" else InputGram()

    model = pico_mamba()
    found = list(survey(adapt(model), TOKENS, watch, Steps("survey", 2, lambda *call: calls.append(call))))
    assert passes == [(0, None), (1, None)]
    assert calls[0] == ("survey", 1, 2, "") and calls[-1] == ("survey", 2, 2, "")
    targets = [target for target in adapt(model).targets if (target.layer, target.kind) != (0, "A_log")]
    assert [target.name for target, _ in found] == [target.name for target in targets]
    stock = stock_inputs(model, TOKENS)
    for target, got in found:
        if target.kind != "A_log":
            x = stock[-1 if target.family == "head" else target.layer, target.kind]
            want = second_moments(x)
            assert_same(got.gram, want.diagonal() if target.kind == "x_proj" else want)
    for stop in walk(adapt(pico_mamba()), TOKENS):
        want = stop.look(a_log(stop), StateError("unit", diagonal=False))
    got = next(got for target, got in found if target.kind == "A_log")
    torch.testing.assert_close(got.gram, want.gram)


def test_a_survey_without_the_head_leaves_it_out() -> None:
    found = survey(adapt(pico_mamba()), TOKENS, lambda t: InputNorm() if t.kind == "in_proj" else None)
    assert [target.name for target, _ in found] == [
        f"backbone.layers.{i}.mixer.in_proj.weight" for i in range(2)
    ]
