"""Less of what comes with the package: built-in models of two layers, a library of a few modules. For tests
in which neither how well a model does nor how long a text is matters."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparsessm.data import texts

LAYERS = 2  # of seven
MODULES = 30  # of each side of the library
SHELF = Path(str(importlib.resources.files("sparsessm").joinpath("builtin")))


def write_builtins(folder: Path) -> Path:
    """The built-in models with their first layers, in a folder `builtin` of this one."""
    for config in SHELF.glob("*/config.json"):
        out = folder / "builtin" / config.parent.name
        shutil.copytree(config.parent, out)
        fields = json.loads(config.read_text())
        (out / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": LAYERS}))
        gone = tuple(f"backbone.layers.{i}." for i in range(LAYERS, fields["num_hidden_layers"]))
        tensors = load_file(out / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
        save_file(kept, out / "model.safetensors", {"format": "pt"})
    return folder


def use_builtins(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """`builtin:NAME` is what `write_builtins` wrote to this folder."""
    real = importlib.resources.files

    def files(anchor: Any = None) -> Any:
        return folder if anchor == "sparsessm" else real(anchor)

    patch.setattr(importlib.resources, "files", files)


def use_library(patch: pytest.MonkeyPatch, modules: int = MODULES) -> None:
    """`stdlib` is a few modules of each side: splitting all of them into tokens takes seconds."""
    whole = texts.stdlib_modules

    def some(*, held_out: bool | None) -> Iterator[tuple[str, str]]:
        return islice(whole(held_out=held_out), modules)

    patch.setattr(texts, "stdlib_modules", some)
