"""The laws of the code inside its files: who chooses elements, who changes weights, what is abstract, what is
asked of objects. Who imports whom: test_package.py.

What is listed under a name with TO_DO breaks a law today. These lists only get shorter."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from types import FunctionType

from sources import OURS, SOURCE, calls, code, functions, place, rooms

# Only patterns chooses elements.

ORDERS = set("topk sort argsort msort kthvalue argmin argmax quantile nanquantile median".split())
OTHER_ORDERS = {  # that choose no elements of a matrix
    "methods/allocation.py": 4,  # shares of matrices
    "methods/grids.py": 1,  # the value farthest from 0, which gives a block its scale
    "methods/hessian.py": 1,  # columns, for a sweep
    "methods/on_grid.py": 1,  # rows by which factors of columns are fitted
    "methods/exact.py": 1,  # the order in which a greedy search takes entries out, then scores
    "methods/structured.py": 2,  # whole units
    "pruning/projection.py": 1,  # directions of layers
    "pruning/widths.py": 1,  # channels of layers
}


def orders(tree: ast.AST) -> int:
    """Calls that bring a tensor into an order. (A list's own `sort` has a key, or nothing.)"""
    return sum(
        isinstance(call.func, ast.Attribute)
        and call.func.attr in ORDERS
        and not any(word.arg == "key" for word in call.keywords)
        for call in calls(tree)
    )


def test_only_patterns_chooses_elements() -> None:
    for file, tree in OURS.items():
        if rooms.room(file) in ("methods", "pruning", "calibration") and place(file) != "methods/patterns.py":
            assert orders(tree) <= OTHER_ORDERS.get(place(file), 0), file
    assert orders(OURS[SOURCE / "methods/patterns.py"])
    chosen = "keep = score >= score.flatten().topk(3).values[-1]\nrows.sort(key=lambda row: row.name)"
    assert orders(code(chosen)) == 1 and orders(code("torch.sort(score)")) == 1


# Only the repair changes weights that stay. That every method alone leaves them is in pruning/test_rows.py.

WRITERS = {"pruning/entries.py", "pruning/units.py"}  # what they write was chosen and repaired in methods/


def writes(tree: ast.AST) -> int:
    """Calls of `Target.replace`, `Target.replace_exactly` and `Target.shift`. (Of others named so:
    `dataclasses.replace` has keywords, that of a string two arguments, that of a path another name;
    `Stop.replace` puts a block in its place.)"""
    return sum(
        isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) != "stop"
        and not call.keywords
        and (call.func.attr, len(call.args)) in (("replace", 1), ("replace_exactly", 1), ("shift", 2))
        for call in calls(tree)
    )


def written_into(function: ast.FunctionDef) -> set[str]:
    """Arguments that a function changes: by assigning to a part of them or by a method in place."""
    own = {argument.arg for argument in function.args.args} - {"self", "cls"}

    def root(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign):
            found.add(root(node.target))
        elif isinstance(node, ast.Assign):
            found |= {root(target) for target in node.targets if not isinstance(target, ast.Name)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.endswith("_") and not node.func.attr.startswith("_"):
                found.add(root(node.func.value))
    return found & own


def test_only_the_loops_write_and_only_the_repair_changes_what_it_is_given() -> None:
    loops = [file for file in OURS if rooms.room(file) in ("methods", "pruning", "calibration")]
    assert {place(file) for file in loops if writes(OURS[file])} <= WRITERS
    others = ("methods/repair.py", "methods/observers.py")  # observers add to their own sums
    for file in loops:
        if rooms.room(file) == "methods" and place(file) not in others:
            assert not [one.name for one in functions(OURS[file]) if written_into(one)], file
    said = "target.replace(2 * matrix)\nreplace(rule, sparsity=0)\n'a'.replace('a', 'b')"
    assert writes(code(said)) == 1
    (scale,) = functions(code("def scale(w, seen):\n    w[0] *= 2\n    new = seen * 2\n    new[0] = 1"))
    (clip,) = functions(code("def clip(w):\n    return w.data.clamp_(0)"))
    assert written_into(scale) == written_into(clip) == {"w"}


# A class is abstract or final; a concrete method is not overridden.

# Fields in common of a recipe and of its rules, and a set of such fields itself.
CONCRETE = {"Choice"}


def classes() -> list[type]:
    """All classes of the package."""
    import_module("sparsessm.cli.commands")  # the commands import one another
    modules = [import_module(rooms.module(file)) for file in OURS if file.stem != "__main__"]
    found = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    return [one for one in found if home(one) == "sparsessm"]


def is_concrete(member: object) -> bool:
    kinds = (FunctionType, property, classmethod, staticmethod)
    return isinstance(member, kinds) and not getattr(member, "__isabstractmethod__", False)


def home(one: type) -> str:
    return one.__module__.partition(".")[0]


def ancestors(one: type) -> list[type]:
    """Of the same package."""
    return [
        base
        for base in one.__mro__[1:]
        if base.__module__.partition(".")[0] == one.__module__.partition(".")[0]
    ]


def overridden(one: type) -> set[str]:
    """Methods of a class that an ancestor has too, not as an abstract one; special methods do not count."""
    return {
        f"{one.__name__}.{name}"
        for base in ancestors(one)
        for name, member in vars(base).items()
        if name in vars(one) and is_concrete(member) and not (name.startswith("__") and name.endswith("__"))
    }


def awaits(one: type) -> set[str]:
    """Attributes that a class declares without a value and that every class made of it gives one."""
    made = [sub for sub in subclasses(one) if not sub.__subclasses__()]
    names = {name for base in (one, *ancestors(one)) for name in vars(base).get("__annotations__", ())}
    return {
        name for name in names if made and not hasattr(one, name) and all(hasattr(sub, name) for sub in made)
    }


def subclasses(one: type) -> list[type]:
    return [below for sub in one.__subclasses__() for below in (sub, *subclasses(sub))]


def concrete_ancestors(one: type) -> set[str]:
    """Ancestors that could be used themselves: neither abstract nor a protocol, and waiting for nothing."""
    return {
        base.__name__
        for base in ancestors(one)
        if not (inspect.isabstract(base) or vars(base).get("_is_protocol") or awaits(base))
    }


def test_no_concrete_method_is_overridden() -> None:
    found = set().union(*map(overridden, classes()))
    assert not found

    class Plain:
        def answer(self) -> int:
            return 1

    class Other(Plain):
        def answer(self) -> int:
            return 2

    assert overridden(Other) == {"Other.answer"} and not overridden(Plain)


def test_a_class_is_abstract_or_final() -> None:
    assert set().union(*map(concrete_ancestors, classes())) == CONCRETE
    shared = type("Shared", (type("Plain", (), {"__module__": "here"}),), {"__module__": "here"})
    assert concrete_ancestors(shared) == {"Plain"}


# An interface is declared, never found by asking. What others wrote has none of ours and may be asked.

ASKED = {  # file -> what it asks of foreign objects
    "cli/ending.py": {"errno"},  # an exception
    "cli/tables.py": {"styled"},  # stdout, which may be the program's own or anybody's
    "data/texts.py": {"eos_token_id", "is_fast"},  # a tokenizer
}


def asked(tree: ast.AST) -> set[str]:
    """Names that `hasattr` and `getattr` ask for, where the code says them."""
    return {
        call.args[1].value
        for call in calls(tree)
        if isinstance(call.func, ast.Name) and call.func.id in ("hasattr", "getattr")
        if isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, str)
    }


def test_no_object_of_ours_is_asked_for_an_interface() -> None:
    for file, tree in OURS.items():
        assert asked(tree) == ASKED.get(place(file), set()), file
    assert asked(code("hasattr(tap, 'paired') or getattr(tap, 'routed', False) or getattr(x, name)")) == {
        "paired", "routed",
    }  # fmt: skip
