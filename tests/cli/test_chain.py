"""What the file of a chain may say: steps and options as the commands have them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command import refused

from sparsessm import cli
from sparsessm.cli import chain

pytestmark = pytest.mark.usefixtures("here")
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
FIT = {"run": "fit", "model": "source", "max-increase": "2%"}
PRUNE = {"run": "prune", "model": "source"}


def read(*steps: Any, source: str = "dense") -> list[chain.Step]:
    Path("chain.yaml").write_text(yaml.safe_dump({"source": source, "steps": [*steps]}, sort_keys=False))
    return chain.read(Path("chain.yaml"), COMMANDS)


def test_a_step_becomes_the_line_that_one_would_type() -> None:
    fit, evaluated, exported, report, upload = read(
        FIT,
        {"run": "eval", "name": "quality", "model": ["source", "fit"], "limit": 4},
        {"run": "export", "model": "fit", "type": "q8_0"},
        {"run": "report", "model": "fit"},
        {"run": "upload", "model": "fit", "to": "me/small", "public": True},
    )
    assert fit.arguments == ["--max-increase=2%", "--out=fit", "--", "dense"]
    assert evaluated.arguments == ["--limit=4", "--out=quality.json", "--", "dense", "fit"]
    assert exported.arguments == ["--type=q8_0", "--gguf=export.gguf", "--", "fit"]
    assert report.arguments == ["--out=fit/report.html", "--", "fit"] and upload.out is None
    assert upload.arguments == ["--public", "--", "fit", "me/small"]
    assert [step.after for step in (fit, evaluated, exported)] == [[], ["fit"], ["fit"]]


def test_flags_and_lists_are_those_of_the_command() -> None:
    (step,) = read({**PRUNE, "no-eval": True, "diagonal": False, "ignore": ["layer:0", "x_proj"]})
    words = ["--no-eval", "--no-diagonal", "--ignore=layer:0", "--ignore=x_proj", "--out=prune"]
    assert step.arguments == [*words, "--", "dense"]
    (step,) = read({**PRUNE, "ignore": "x_proj", "diagonal": True})
    assert step.arguments[:2] == ["--ignore=x_proj", "--diagonal"]


def test_a_number_of_samples_may_be_that_of_a_step() -> None:
    samples, fit = read({"run": "samples", "model": "source"}, {**FIT, "samples": "samples"})
    assert samples.out == fit.counted == "samples.json" and fit.after == ["samples"]
    assert fit.arguments == ["--max-increase=2%", "--out=fit", "--", "dense"]


def test_a_step_follows_from_what_it_reads_by_path_too() -> None:
    first, second = read({**PRUNE, "out": "made/half"}, {"run": "pack", "model": "./made/half"})
    assert first.after == [] and second.after == ["prune"]


def test_a_model_that_looks_like_an_option_is_none() -> None:
    (step,) = read({"run": "inspect", "model": "source"}, source="--help")
    assert step.arguments == ["--", "--help"]


@pytest.mark.parametrize("run", chain.KINDS)
def test_every_command_of_a_chain_is_a_command_and_writes_where_it_says(run: str) -> None:
    options = {name for part in COMMANDS[run].params for name in part.opts}
    kind = chain.KINDS[run]
    assert (kind.suffix is not None) == bool(options & {"--out", "--gguf"})
    assert kind.resumes == ("--resume" in options)
    assert {"--json", "--quiet"} <= options and (kind.suffix is None or "--force" in options)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (
            [{"run": "fti", "model": "source"}],
            "unknown command 'fti'; allowed: inspect, samples, analyze, fit, prune",
        ),
        ([{"run": "serve", "model": "source"}], "unknown command 'serve'"),
        ([{}], "step 1 has no run; allowed: run: COMMAND, one of inspect"),
        (["fit"], "step 1 has no run"),
        ([], "steps is missing; allowed: a list of 1 to 100 steps"),
        ([PRUNE] * 101, "a list of 1 to 100 steps"),
        (
            [{**FIT, "max_increase": "2%"}],
            "step fit: unknown option 'max_increase'; allowed: run, name, model",
        ),
        ([{**FIT, "max_size": "1MB"}], "did you mean max-size?"),
        ([{**FIT, "force": "true"}], "unknown option 'force'"),
        ([{**FIT, "help": "true"}], "unknown option 'help'"),
        ([{**FIT, "max-increase": "200"}], "step fit: max-increase is 200, which would be"),
        ([{"run": "fit", "model": "source"}], "step fit: no limit was given"),
        ([{**FIT, "max-increase": ["1%", "2%"]}], "max-increase is ['1%', '2%']; allowed: one value"),
        ([{**FIT, "max-increase": {"a": 1}}], "allowed: one value"),
        ([{**FIT, "max-increase": ""}], "max-increase is ''; allowed: one value"),
        ([{**PRUNE, "length": "one"}], "step prune: Invalid value for '--length'"),
        ([{**PRUNE, "sparsity": "1.5"}], "step prune: sparsity"),
        ([{**PRUNE, "no-eval": "maybe"}], "no-eval is 'maybe'; allowed: true or false"),
        ([{"run": "fit", "max-increase": "2%"}], "model is missing; allowed: source, the name of a step"),
        ([{"run": "upload", "model": "source"}], "step upload: to is missing; allowed: OWNER/NAME"),
        (
            [{"run": "pack", "model": "fit"}, FIT],
            "model is the step 'fit', which comes later; allowed: source",
        ),
        (
            [FIT, {"run": "inspect", "model": "fit"}, {"run": "pack", "model": "inspect"}],
            "model is the step 'inspect', which writes no model; allowed: source, fit, or ./inspect",
        ),
        ([FIT, FIT], "two steps are called 'fit'; give one of them another name"),
        ([{**PRUNE, "name": "source"}], "step 1 has the name 'source'; allowed: letters"),
        ([{**PRUNE, "name": "../up"}], "step 1 has the name '../up'"),
        (
            [{**PRUNE, "out": "/etc/model"}],
            "out is '/etc/model'; allowed: a path below the folder of the chain",
        ),
        ([{**PRUNE, "out": "a/../../b"}], "a path below the folder"),
        ([{**PRUNE, "out": "chain.json"}], "out is 'chain.json', which is the chain's own"),
        ([PRUNE, {"run": "pack", "model": "prune", "out": "prune"}], "where step prune writes 'prune'"),
        ([PRUNE, {"run": "pack", "model": "prune", "out": "prune/in"}], "where step prune writes 'prune'"),
        ([{"run": "inspect", "model": "source", "out": "here"}], "unknown option 'out'"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_name(steps: list[Any], says: str) -> None:
    with pytest.raises(ValueError) as refusal:
        read(*steps)
    assert str(refusal.value).startswith("chain chain.yaml: ") and says in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected the fields source and steps"),
        ("- run: fit", "expected the fields source and steps"),
        ("steps: [{run: inspect, model: source}]", "source is missing"),
        ("source: [a]\nsteps: []", "source is missing"),
        ("source: dense\nmodel: dense\nsteps: []", "unknown field 'model'; allowed: source, steps"),
        ("source: dense\nsource: other\nsteps: []", "line 2: 'source' appears twice"),
        ("source: dense\nsteps: [{run: inspect, run: fit}]", "'run' appears twice"),
        ("source: !!python/object/apply:os.system ['touch pwned']\nsteps: []", "source is missing"),
        ("source: &a [*a]\nsteps: []", "line 1: nested too deeply"),
        ("[" * 3000, "nested too deeply"),
        ("source: dense\nsteps: {", "not readable as YAML"),
        ("source: dense\nsteps: &a [&b [*a]]", "nested too deeply"),
        ("\0", "not readable as YAML"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{b}'] * 10)}]\n" for b, n in zip("abcde", "bcdef", strict=True)
        ), "more than 100,000 values"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_chain_is_refused_in_one_line(text: str, says: str) -> None:
    Path("chain.yaml").write_text(text)
    line = refused("run", "chain.yaml")
    assert line.startswith("error: chain chain.yaml: ") and says in line
    assert not Path("pwned").exists() and not Path("chain.json").exists()


def test_what_is_no_yaml_file_is_refused() -> None:
    Path("chain.json").write_text("{}")
    assert "'chain.json' is no chain; allowed: a file that ends in .yaml" in refused("run", "chain.json")
    assert "no-such.yaml: no such file" in refused("run", "no-such.yaml")
    Path("chain.yaml").write_bytes(b"\xff\xfe\xff")
    assert "chain chain.yaml: not UTF-16 text" in refused("run", "chain.yaml")
