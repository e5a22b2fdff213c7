"""A chain: several commands in one YAML file, read and checked before any of them runs (docs/chain.md).

Place in the flow: `chaining.py` runs what this file understands. A step is a command with its own options,
and the command's own parser checks them, so that nothing is said twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.foreign import decoded, from_yaml, read_bytes, short
from ..recipe.recipe import Recipe
from ..studies.limits import Limits

SOURCE = "source"  # the model that the chain begins with
FIELDS = ("source", "steps")
OWN = ("run", "name")  # fields of a step that are no options
MOST = 100  # steps
_NAME = re.compile(r"[A-Za-z][\w-]{0,49}", re.ASCII)
# What the chain itself decides.
_DECIDED = ("--help", "--json", "--quiet", "--force", "--resume", "--dry-run")
_OUT = ("--out", "--gguf")
_SAYS = "format_message"  # of click's mistakes
_LIMITS = ("max_increase", "max_drop", "max_size", "min_speed", "tasks")
# Options whose value may be a file, a directory, or the result of a step.
PATHS = ("model", "against", "recipe", "tokenizer", "data", "include-path")
_RESULTS = ("model", "against", "recipe", "tokenizer")


@dataclass(frozen=True)
class Kind:
    """A command as a step.

    Attributes:
        suffix: of what it writes, where the step has no `out`; None: it writes nothing of its own.
        gives: whether that is a model, which later steps may name.
        resumes: whether the command goes on with `--resume`.
    """

    suffix: str | None = None
    gives: bool = False
    resumes: bool = False


KINDS: Mapping[str, Kind] = {
    "inspect": Kind(),
    "samples": Kind(suffix=".json"),
    "analyze": Kind(suffix=""),
    "fit": Kind(suffix="", gives=True, resumes=True),
    "prune": Kind(suffix="", gives=True, resumes=True),
    "eval": Kind(suffix=".json"),
    "report": Kind(suffix="/report.html"),  # of the model that it is about
    "pack": Kind(suffix="", gives=True),
    "unpack": Kind(suffix="", gives=True),
    "export": Kind(suffix=".gguf"),
    "upload": Kind(),
}


@dataclass(frozen=True)
class Step:
    """One command of a chain.

    Attributes:
        name: unique in the chain. run: the command.
        options: as the file has them, results of steps replaced by where they lie.
        arguments: the command line, without what the chain decides.
        out: where the result lies, relative to the chain's folder; None: there is none.
        reads: paths, or names of other things, that the options name.
        after: names of the steps whose results it reads.
        forces: whether the command has `--force`.
        counted: the document of the step `samples` that says how many windows it takes; empty: none does.
    """

    name: str
    run: str
    options: Mapping[str, Any]
    arguments: Sequence[str]
    out: str | None
    reads: Sequence[str]
    after: Sequence[str]
    forces: bool
    counted: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.run]


def read(file: Path, commands: Mapping[str, Any]) -> list[Step]:
    """The steps of a chain, in their order.

    Args:
        commands: of the command line, by name: what parses the options of each.

    Raises:
        ValueError: the file is no chain; a field, a step, an option or a name that is unknown, with those
            that are allowed; two steps with one name or one place. Begins with the file.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{str(file)!r} is no chain; allowed: a file that ends in .yaml or .yml")
    content = read_bytes(file, 1 << 20)
    try:
        return _steps(file, from_yaml(decoded(content)), commands)
    except ValueError as error:
        raise ValueError(f"chain {file}: {' '.join(str(error).split())}") from None


def _steps(file: Path, chain: Any, commands: Mapping[str, Any]) -> list[Step]:
    if not isinstance(chain, dict):
        raise ValueError("expected the fields source and steps")
    _known(chain, FIELDS, "field")
    source, listed = chain.get("source"), chain.get("steps")
    if not isinstance(source, str) or not source:
        raise ValueError("source is missing; it names the model that the chain begins with")
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST:
        raise ValueError(f"steps is missing; allowed: a list of 1 to {MOST} steps")
    names = [_named(step, place) for place, step in enumerate(listed, 1)]
    found: list[Step] = []
    for name, fields in zip(names, listed, strict=True):
        if [step for step in found if step.name == name]:
            raise ValueError(f"two steps are called {name!r}; give one of them another name (name: ...)")
        try:
            step = _step(name, fields, source, found, names, commands)
            _refuse_place(step, found, file)
        except ValueError as error:
            raise ValueError(f"step {name}: {error}") from None
        found.append(step)
    return found


def _known(fields: Mapping[str, Any], allowed: Iterable[str], what: str) -> None:
    allowed = list(allowed)
    for name in fields:
        if name not in allowed:
            near = difflib.get_close_matches(name.replace("_", "-"), allowed, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown {what} {short(name)}; allowed: {', '.join(allowed)}{hint}")


def _named(step: Any, place: int) -> str:
    """The name of a step, by default its command's."""
    if not isinstance(step, dict) or not isinstance(step.get("run"), str):
        raise ValueError(f"step {place} has no run; allowed: run: COMMAND, one of {', '.join(KINDS)}")
    if step["run"] not in KINDS:
        _known({step["run"]: None}, KINDS, "command")
    name = step.get("name", step["run"])
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == SOURCE:
        raise ValueError(
            f"step {place} has the name {short(name)}; allowed: letters, digits, - and _, a letter "
            f"first, and not {SOURCE}"
        )
    return name


def _step(
    name: str,
    fields: Mapping[str, Any],
    source: str,
    before: Sequence[Step],
    names: Sequence[str],
    commands: Mapping[str, Any],
) -> Step:
    run = fields["run"]
    command, kind = commands[run], KINDS[run]
    places = [part for part in command.params if part.param_type_name == "argument"]
    flags = {
        part.opts[0].removeprefix("--"): part
        for part in command.params
        if part.param_type_name == "option" and part.opts[0] not in (*_DECIDED, *_OUT)
    }
    positional: dict[str, Any] = dict(zip(("model", "to"), places, strict=False))
    writes = kind.suffix is not None
    _known(fields, [*OWN, *positional, *["out"] * writes, *flags], "option")
    options: dict[str, Any] = {}
    for option, value in fields.items():
        if option not in OWN:
            part = positional.get(option) or flags.get(option)
            many = part is not None and (part.multiple if option in flags else part.nargs != 1)
            values = _values(option, value, many)
            if option in _RESULTS:
                values = [_result(option, one, source, before, names) for one in values]
            options[option] = values if many else values[0]
    counts = {step.name: step.out for step in before if step.run == "samples"}
    counted = counts.get(str(options.get("samples"))) or ""
    if counted:
        options["samples"] = counted
    for option, part in positional.items():
        if part.required and option not in options:
            hint = f"{SOURCE}, the name of a step, or a model" if option == "model" else part.metavar
            raise ValueError(f"{option} is missing; allowed: {hint}")
    out = _out(options.pop("out", None), name, kind, options.get("model")) if writes else None
    arguments = [
        word for option in options if option in flags for word in _flag(option, flags[option], options)
    ]
    if counted:
        arguments.remove(f"--samples={counted}")
    if out is not None:
        arguments.append(f"{_written(command)}={out}")
    arguments += [
        "--",
        *(one for option in positional if option in options for one in _list(options[option])),
    ]
    _parse(command, run, arguments)
    reads = [one for option in PATHS if option in options for one in _list(options[option])]
    reads += [counted] * bool(counted)
    after = [step.name for step in before if step.out and any(_inside(one, step.out) for one in reads)]
    forces = any("--force" in part.opts for part in command.params)
    return Step(name, run, {"run": run, "out": out, **options}, arguments, out, reads, after, forces, counted)


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _values(option: str, value: Any, many: bool) -> list[str]:
    """What an option is given, as texts."""
    values: list[Any] = value if isinstance(value, list) and many else [value]
    if not values or any(not isinstance(one, str) or not one for one in values):
        allowed = "a value, or a list of them" if many else "one value"
        raise ValueError(f"{option} is {short(value)}; allowed: {allowed}")
    return values


def _flag(option: str, part: Any, options: Mapping[str, Any]) -> list[str]:
    """An option on the command line."""
    if not part.is_flag:
        return [f"--{option}={one}" for one in _list(options[option])]
    if (said := options[option]) not in ("true", "false"):
        raise ValueError(f"{option} is {short(said)}; allowed: true or false")
    return [part.opts[0]] if said == "true" else part.secondary_opts[:1]


def _written(command: Any) -> str:
    return next(name for part in command.params for name in part.opts if name in _OUT)


def _result(option: str, value: str, source: str, before: Sequence[Step], names: Sequence[str]) -> str:
    """What a value means: the source, the result of a step before, or itself."""
    if value == SOURCE:
        return source
    if value not in names:
        return value
    giving = {step.name: step.out for step in before if step.kind.gives}
    if value in giving:
        return str(giving[value])
    why = "writes no model" if value in [step.name for step in before] else "comes later"
    allowed = ", ".join((SOURCE, *giving))
    raise ValueError(
        f"{option} is the step {value!r}, which {why}; allowed: {allowed}, or ./{value} for a path"
    )


def _out(given: Any, name: str, kind: Kind, model: Any) -> str:
    """Where the result goes, below the folder of the chain."""
    if given is None:
        given = f"{model}{kind.suffix}" if str(kind.suffix).startswith("/") else f"{name}{kind.suffix}"
    path = PurePosixPath(given)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in given:
        raise ValueError(f"out is {short(given)}; allowed: a path below the folder of the chain")
    return path.as_posix()


def _inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or something in it."""
    one, other = PurePosixPath(path), PurePosixPath(folder)
    return one == other or other in one.parents


def _refuse_place(step: Step, before: Sequence[Step], file: Path) -> None:
    """Refuse a result in the place of another, or of the chain."""
    if step.out is None:
        return
    if step.out in (file.name, file.with_suffix(".json").name):
        raise ValueError(f"out is {step.out!r}, which is the chain's own; choose another name")
    for other in before:
        if other.out is None:
            continue
        page = step.run == "report" and other.kind.gives  # a page in the directory that it is about
        if step.out == other.out or (
            not page and (_inside(step.out, other.out) or _inside(other.out, step.out))
        ):
            raise ValueError(f"out is {step.out!r}, where step {other.name} writes {other.out!r}")


def _parse(command: Any, run: str, arguments: Sequence[str]) -> None:
    """Have the command's own parser look at its line, and what is behind it at recipes and limits.

    Raises:
        ValueError: what they say.
    """
    try:
        given = command.make_context(run, list(arguments)).params
    except Exception as error:  # of whichever click typer uses
        say = getattr(type(error), _SAYS, None)
        raise ValueError(say(error) if say else str(error)) from None
    if run == "fit":
        Limits.parse(**{name: given[name] for name in _LIMITS})
    if run in ("fit", "prune"):
        fields = {name: given[name] for name in Recipe.model_fields if given.get(name) not in (None, (), [])}
        if given.get("recipe") is None and given.get("structured") is None:
            Recipe(**fields)
