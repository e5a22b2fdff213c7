"""`samples: auto`: the curve against brute force, its bookkeeping, the knee, and that the choice repeats."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import TEXT, pico_mamba, pico_tokenizer
from torch import Tensor
from typer.testing import CliRunner

import sparsessm
from sparsessm import cli
from sparsessm.architectures import Architecture, adapt
from sparsessm.checkpoint import Checkpoint
from sparsessm.data.texts import calibration_windows
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import Assignment, assign
from sparsessm.studies import windows as study
from sparsessm.studies.windows import HELD_OUT, Step, agreement, choose, knee, steps

FAST = {"data": "text.txt", "length": 16}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A pico checkpoint, in a directory with a text of some hundred windows."""
    monkeypatch.chdir(tmp_path)
    pico_mamba().save_pretrained("dense")
    pico_tokenizer().save_pretrained("dense")
    Path("text.txt").write_text(" ".join(random.Random(0).choices(TEXT.split(), k=2000)))
    return sparsessm.load("dense")


def windows(count: int, held: int | None = None) -> Tensor:
    """Random tokens: `count` windows of 16 to calibrate on, and those held out."""
    held = min(count // 2, HELD_OUT) if held is None else held
    return torch.randint(64, (count + held, 16), generator=torch.Generator().manual_seed(1))


def planned(architecture: Architecture, **fields: Any) -> Assignment:
    recipe = Recipe(**fields).resolved(model="pico", trained_length=16)
    return assign(recipe, architecture.targets)


def curve(count: int, tokens: Tensor | None = None, **fields: Any) -> list[Step]:
    architecture = adapt(pico_mamba())
    return list(
        steps(architecture, planned(architecture, **fields), windows(count) if tokens is None else tokens)
    )


def test_agreement_is_cohens_kappa() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 200, 300, generator=generator) < 0.3
    assert agreement([(first, first)]) == 1
    assert agreement([(first, second)]) == pytest.approx(0, abs=0.02)
    assert agreement([(first, ~first)]) < 0
    # both keep 20, one alone 5, the other alone 10, both remove 15: agreed 0.7, by chance 0.5 (Cohen 1960)
    one = torch.tensor([True] * 25 + [False] * 25)
    other = torch.tensor([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert agreement([(one, other)]) == pytest.approx(0.4)


def test_matrices_count_by_their_entries_and_those_without_a_choice_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(30, 10, generator=generator) < 0.5
    other = torch.rand(2, 10, 10, generator=generator) < 0.5
    full = torch.ones(1000, 10, dtype=torch.bool)
    pairs = [(same, same), (other[0], other[1])]
    assert agreement(pairs) == pytest.approx(0.75, abs=0.1)
    assert agreement([*pairs, (full, full)]) == pytest.approx(agreement(pairs), rel=1e-12)
    assert agreement([(full, full)]) == 1  # nothing was left to chance


def test_the_knee_is_before_the_first_doubling_that_brings_little_of_both() -> None:
    def at(*points: tuple[float, float]) -> list[Step]:
        return [Step(4 * 2**i, same, error, 0.0) for i, (same, error) in enumerate(points)]

    assert knee(at((0.5, 1.0))) is None
    assert knee(at((0.5, 1.0), (0.51, 0.995))) == 4
    assert knee(at((0.5, 1.0), (0.55, 0.995))) is None  # masks still move
    assert knee(at((0.5, 1.0), (0.505, 0.9))) is None  # the error still falls
    assert knee(at((0.5, 1.0), (0.6, 0.8), (0.61, 0.798), (0.9, 0.1))) == 8
    assert knee(at((0.5, 1.0), (0.4, 1.2))) == 4  # worse is no gain


def test_the_curve_is_what_brute_force_gives() -> None:
    """Wanda's masks and their errors, by hand from the inputs of the stock model's own layers."""
    model, tokens = pico_mamba().requires_grad_(False), windows(8)
    halves = [tokens[[0, 1, 4, 5]], tokens[[2, 3, 6, 7]]]
    inputs: dict[str, Tensor] = {}
    kinds = ("in_proj", "x_proj", "dt_proj", "out_proj")
    layers = {name: module for name, module in model.named_modules() if name.endswith(kinds)}
    for name, module in layers.items():
        module.register_forward_hook(lambda _, x, __, name=name: inputs.__setitem__(name, x[0].double()))

    def seen(part: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            model(part)
        for name in layers:
            if name.endswith("dt_proj"):  # the stock forward multiplies by its weight itself
                x_proj = name.replace("dt_proj", "x_proj")
                inputs[name] = inputs[x_proj] @ layers[x_proj].weight.double()[:1].T
        return {name: x.flatten(0, -2) for name, x in inputs.items()}

    def masks(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        keeps = {}
        for name, x in rows.items():
            score = layers[name].weight.double().abs() * x.square().sum(0).sqrt()
            order = score.argsort(dim=1, stable=True).argsort(dim=1)
            keeps[name] = order >= round(score.shape[1] / 2)
        return keeps

    parts = [seen(half) for half in halves]
    every = masks({name: torch.cat([part[name] for part in parts]) for name in layers})
    held = seen(tokens[8:])
    errors = entries = agreed = chance = 0.0
    for name, module in layers.items():
        weight = module.weight.double()
        lost = (held[name] @ (weight * ~every[name]).T).square().sum()
        errors += weight.numel() * float(lost / (held[name] @ weight.T).square().sum())
        entries += weight.numel()
        first, second = (masks(part)[name] for part in parts)
        by_chance = float(first.double().mean() * second.double().mean())
        by_chance += float((~first).double().mean() * (~second).double().mean())
        agreed += weight.numel() * (float((first == second).double().mean()) - by_chance)
        chance += weight.numel() * (1 - by_chance)
    step = curve(8, tokens, target="projections", method="wanda")[-1]
    assert step.windows == 8
    assert step.error == pytest.approx(errors / entries, rel=1e-5)
    assert step.agreement == pytest.approx(agreed / chance, rel=1e-9)
    assert 0 < step.agreement < 1


@pytest.mark.parametrize(
    "fields", [{}, {"pattern": "2:4", "ignore": "dt_proj"}, {"method": "wanda", "allocation": "owl"}], ids=str
)
def test_doubling_gives_what_one_look_at_all_windows_gives(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = windows(16)
    doubled = curve(16, tokens, **fields)[-1]
    first, second = [0, 1, 4, 5, 8, 9, 10, 11], [2, 3, 6, 7, 12, 13, 14, 15]
    monkeypatch.setattr(study, "FIRST", 16)
    (once,) = curve(16, torch.cat([tokens[first + second], tokens[16:]]), **fields)
    assert once.windows == doubled.windows == 16
    assert doubled.agreement == pytest.approx(once.agreement, abs=2e-3)
    assert doubled.error == pytest.approx(once.error, rel=1e-3)


def test_every_window_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: Counter[tuple[int, ...]] = Counter()
    original = study.survey

    def survey(architecture: Any, tokens: Tensor, *rest: Any) -> Any:
        looked.update(tuple(window) for window in tokens.tolist())
        return original(architecture, tokens, *rest)

    monkeypatch.setattr(study, "survey", survey)
    tokens = windows(20)
    sizes = []
    architecture = adapt(pico_mamba())
    for step in steps(architecture, planned(architecture), tokens):
        sizes.append(step.windows)
        assert looked == Counter(
            tuple(window) for window in tokens[[*range(sizes[-1]), *range(20, 30)]].tolist()
        )
    assert sizes == [4, 8, 16]  # not 32: the text has 20


def test_equal_halves_agree() -> None:
    tokens = windows(4)
    tokens[2:4] = tokens[:2]
    (step,) = curve(4, tokens)
    assert step.agreement == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sparsegpt"},
        {"method": "sparsessm", "target": "ssm"},
        {"method": "sparsessm-vote", "target": "ssm"},
        {"method": "exact", "target": "ssm", "diagonal": True},
        {"method": "wanda", "pattern": "2:4", "ignore": "dt_proj"},
        {"target": "conv1d"},
        {"target": "head"},
        {"allocation": "hessian-trace"},
        {"repair": "none"},
        {"rules": ({"targets": ["in_proj"]}, {"targets": ["A_log", "out_proj"], "method": "magnitude"})},
    ],
    ids=str,
)
def test_every_method_and_target_has_a_curve(fields: dict[str, Any]) -> None:
    points = curve(8, **fields)
    assert [step.windows for step in points] == [4, 8]
    for step in points:
        assert 0 < step.agreement <= 1
        assert 0 < step.error < 2


def test_looking_changes_nothing_and_tells_how_far_it_is() -> None:
    model = pico_mamba()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[tuple[str, int, int, str]] = []
    architecture = adapt(model)
    tokens = windows(8)
    samples, points = choose(architecture, planned(architecture), tokens, lambda *what: told.append(what))
    assert samples in (4, 8)
    assert [point["windows"] for point in points] == [4, 8]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    last = {stage: (done, total) for stage, done, total, _ in told}
    assert list(last) == ["fisher", "4 held-out windows", "4 windows", "8 windows"]
    assert all(done == total for done, total in last.values())


def test_at_most_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MOST", 8)
    assert [step.windows for step in curve(40, method="wanda", target="projections")] == [4, 8]
    monkeypatch.setattr(study, "knee", lambda curve: None)
    architecture = adapt(pico_mamba())
    samples, points = choose(architecture, planned(architecture), windows(40))
    assert samples == points[-1]["windows"] == 8


def test_only_some_layers_are_looked_at() -> None:
    architecture = adapt(pico_mamba(num_hidden_layers=9))
    looked = study.watched(architecture, planned(architecture, target="ssm"))
    assert [target.layer for target in looked.values()] == [0, 3, 5, 8]
    looked = study.watched(architecture, planned(architecture, ignore="layer:0"))
    assert {target.layer for target in looked.values()} == {1, 3, 6, 8}


def test_entries_removed_before_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_mamba()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.weight[:32] = 0  # half of it
    compared: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(study, "agreement", lambda pairs: compared.extend(pairs) or 1.0)
    architecture = adapt(model)
    others = ["x_proj", "dt_proj", "out_proj"]
    fields: dict[str, Any] = {"target": "projections", "ignore": others, "allocation": "uniform"}
    next(steps(architecture, planned(architecture, sparsity=0.75, **fields), windows(4)))
    for pair in compared:
        assert [(mask.numel(), int(mask.sum())) for mask in pair] == [(512, 256)] * 2


def test_too_little_text_and_methods_without_data_are_refused(dense: Checkpoint) -> None:
    with pytest.raises(ValueError, match="needs 5 different windows, the text has 4 of 16 tokens"):
        curve(4, windows(4, held=0))
    Path("short.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="different windows, the text has . of 64 tokens; use a shorter"):
        sparsessm.prune(dense, samples="auto", data="short.txt", length=64, measure=False)
    with pytest.raises(ValueError, match="nothing to compare: magnitude scores without calibration windows"):
        sparsessm.prune(dense, samples="auto", method="magnitude", data="missing.txt", measure=False)


def test_the_first_windows_are_the_same_however_many_are_drawn(dense: Checkpoint) -> None:
    draw: dict[str, Any] = {"length": 16, "seed": 3}
    many = calibration_windows("text.txt", dense.tokenizer, samples=64, **draw)
    few = calibration_windows("text.txt", dense.tokenizer, samples=16, **draw)
    assert torch.equal(many[:16], few)
    every = calibration_windows("text.txt", dense.tokenizer, samples=10**5, distinct=True, **draw)
    assert len(every) < 10**5
    assert torch.equal(every[:64], many)
    assert len({tuple(window) for window in every.tolist()}) == len(every)


def test_the_choice_is_recorded_and_repeats_bit_for_bit(dense: Checkpoint) -> None:
    report = sparsessm.prune(dense, samples="auto", seed=5, **FAST, measure=False)
    chosen = report.recipe["samples"]
    sizes = [step["windows"] for step in report.advice]
    assert chosen in sizes
    assert sizes == [4 * 2**i for i in range(len(sizes))]
    assert report.record()["advice"] == report.advice
    assert Recipe(**report.recipe).samples == chosen
    again = sparsessm.load("dense")
    repeated = sparsessm.prune(again, recipe=Recipe(**report.recipe), measure=False)
    assert repeated.fingerprint == report.fingerprint
    assert repeated.advice == []
    tensors = again.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in dense.model.state_dict().items())


def test_the_command_shows_the_curve(dense: Checkpoint) -> None:
    line = ["prune", "dense", "--samples", "auto", "--data", "text.txt", "--length", "16", "--no-eval"]
    shown = CliRunner().invoke(cli.app, [*line, "-o", "out"])
    assert shown.exit_code == 0, shown.output
    record = json.loads(Path("out/pruning.json").read_text())
    assert f"{record['recipe']['samples']} (chosen)" in shown.stdout
    assert f"calibrating on {record['recipe']['samples']} windows" in shown.stderr
    assert "4 windows: " in shown.stderr
    quiet = CliRunner().invoke(cli.app, [*line, "-o", "again", "--quiet", "--json"])
    assert quiet.stderr == ""
    document = json.loads(quiet.stdout)
    assert [{**step, "seconds": 0} for step in document["advice"]] == [
        {**step, "seconds": 0} for step in record["advice"]
    ]
    refused = CliRunner().invoke(cli.app, [*line, "-o", "none", "--method", "magnitude", "--quiet"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: samples 'auto' has nothing to compare: magnitude")
