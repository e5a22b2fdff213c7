"""What an adapter declares, nobody has to find out: targets by kind, outputs; and classes are final."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import FAMILIES, pico_hybrid
from torch import nn

import sparsessm
from sparsessm.architectures import MODEL_TYPES, Block, adapt

SOURCE = Path(sparsessm.__file__).parent
ROOMS = ("architectures", "methods", "calibration", "pruning")
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
STACKS: Mapping[str, Callable[[], Any]] = {
    "mamba": pico_mamba,
    "falcon_mamba": pico_falcon_mamba,
    "mamba2": pico_mamba2,
}


def model_of(name: str) -> Any:
    return STACKS[name]() if name in STACKS else pico_hybrid(name)


@pytest.mark.parametrize("name", [*STACKS, *FAMILIES])
def test_a_target_is_had_by_its_kind(name: str) -> None:
    architecture = adapt(model_of(name))
    for block in (*architecture.blocks, architecture.tail):
        for target in block.targets:
            assert block.target(target.kind) is target
        with pytest.raises(ValueError, match="has no target 'router'; it has: ") as error:
            block.target("router")
        assert block.name in str(error.value) and block.targets[0].kind in str(error.value)


def assert_module_made(module: Any, kept: torch.Tensor, block: Block, hidden: torch.Tensor) -> None:
    """What was kept is what the module makes of what it is fed."""
    fed: list[torch.Tensor] = []
    with module.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0])):
        block.forward(hidden)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(kept, fed[0] @ module.weight.mT + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STACKS)
def test_outputs_are_those_of_the_stock_modules(name: str) -> None:
    """Held against hooks on the model's own modules, by their names."""
    model = model_of(name)
    architecture = adapt(model)
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            linear = [target for target in block.targets if target.module_class == "Linear"]
            with block.outputs() as kept:
                block.forward(hidden)
            assert kept.keys() == {target.name for target in linear} and len(kept) >= 2
            for target in linear:
                module = model.get_submodule(target.module)
                assert_module_made(module, kept[target.name], block, hidden)
            assert not any(module._forward_hooks for module in model.modules())
        with architecture.tail.outputs() as kept:
            architecture.tail.forward(hidden)
        assert not kept


@pytest.mark.parametrize("name", [*STACKS, *FAMILIES])
def test_a_block_says_whether_it_mixes_and_attends(name: str) -> None:
    for block in adapt(model_of(name)).blocks:
        modules = {path.rpartition(".")[2] for path, _ in block.layer.named_modules()}
        assert (block.mixer is not None) == ("conv1d" in modules)
        # every kind of attention has keys in one matrix or compressed; some delta rules have k_proj as well
        keys = {"k_proj", "kv_a_proj_with_mqa"} & modules
        mixes_alone = block.mixer is not None and name in ("olmo_hybrid", "kimi_linear")
        assert block.attends == (bool(keys) and not mixes_alone)


def test_states_of_what_has_no_projections_are_not_projected() -> None:
    for name in ("mamba", "falcon_mamba", "bamba"):
        architecture = adapt(model_of(name))
        assert not architecture.projects
        with pytest.raises(ValueError, match=f"states of a {type(architecture).__name__} model cannot be"):
            architecture.project(architecture.blocks[0], torch.ones(1), torch.ones(1))


def classes() -> Iterator[type]:
    for room in ROOMS:
        for file in sorted((SOURCE / room).rglob("*.py")):
            parts = file.relative_to(SOURCE).with_suffix("").parts
            module = importlib.import_module(".".join(["sparsessm", *parts]).removesuffix(".__init__"))
            yield from (
                c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
            )


def overridden(kind: type) -> list[str]:
    """Concrete methods of its own bases that a class replaces; libraries' bases are there to be filled in."""
    found = []
    for base in kind.__mro__[1:]:
        if not base.__module__.startswith(("sparsessm", __name__)):
            continue
        for name, what in vars(base).items():
            method = inspect.isfunction(what) or isinstance(what, property | classmethod | staticmethod)
            abstract = name in getattr(base, "__abstractmethods__", ())
            if method and not abstract and not name.startswith("__") and name in vars(kind):
                found.append(f"{kind.__name__}.{name}")
    return found


def test_no_concrete_method_is_overridden() -> None:
    assert len(list(classes())) > 40
    assert [name for kind in classes() for name in overridden(kind)] == []


def test_an_overridden_method_is_found() -> None:
    class Base:
        def asked(self) -> int:
            return 1

    class Other(Base):
        def asked(self) -> int:
            return 2

    assert overridden(Other) == ["Other.asked"]


def test_an_adapter_is_final() -> None:
    assert not [kind.__name__ for kind in MODEL_TYPES.values() if kind.__subclasses__()]


def asking(tree: ast.AST) -> list[int]:
    """Lines that ask an object what it has."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
    ]


def test_what_a_family_has_is_declared() -> None:
    """The one exception reads fields of the stock configuration under the names that a family declares."""
    found = {}
    for room in ROOMS:
        for file in (SOURCE / room).rglob("*.py"):
            if lines := asking(ast.parse(file.read_text(encoding="utf-8"))):
                found[f"{room}/{file.name}"] = len(lines)
    assert found == {"architectures/hybrid.py": 1}
    assert asking(ast.parse("x = 1\nhasattr(x, 'y')")) == [2]


def test_only_stock_models_are_adapted() -> None:
    with pytest.raises(ValueError, match="model type 'Linear' has no adapter; supported: "):
        adapt(nn.Linear(1, 1))
