"""The experts of a mixture: stock code keeps them in two tensors (E, out, in); each slice is a target.

Stock code has several ways to run them, chosen by the configuration. They run as it says while nobody looks
at an expert; while somebody does, here, one after the other, on the tokens that the stock router sends them.
So do experts whose rows torch's grouped product, the stock default, refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.architectures.target import Target
from sparsessm.kernels import products

# (kind, inputs (1, n, in), which tokens of the slab they are (n,)): before an expert's product is made.
Fed = Callable[[str, Tensor, Tensor], None]
# (kind, outputs (n, out)): after it.
Made = Callable[[str, Tensor], None]


def is_experts(module: nn.Module) -> bool:
    """Whether this is a stock module of stacked experts."""
    weight = dict(module.named_parameters(recurse=False)).get("down_proj")
    return weight is not None and weight.ndim == 3


def groups(experts: Any) -> bool:
    """Whether torch's grouped product takes these experts: rows must be multiples of 16 bytes."""
    matrices = (experts.get_parameter(_first(experts)), experts.down_proj)
    return all(m.shape[-1] * m.element_size() % 16 == 0 for m in matrices)


def kinds(experts: Any) -> list[str]:
    """Kinds of their targets in the order of the data: both matrices of an expert, then the next expert's."""
    first = _first(experts)
    numbers = range(experts.down_proj.shape[0])
    return [f"experts.{name}.{e}" for e in numbers for name in (first, "down_proj")]


def targets(
    experts: Any, prefix: str, layer: int, stored: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Target]]:
    """(kind, target) of each expert's matrices; `prefix` is the full name of the module and a dot."""
    for kind in kinds(experts):
        _, name, number = kind.split(".")
        parameter = experts.get_parameter(name)
        yield (
            kind,
            Target(
                f"{prefix}{name}.{number}",
                "projections",
                kind,
                layer,
                parameter,
                stored.get(prefix + name, parameter.dtype),
                module_class=type(experts).__name__,
                slice=int(number),
            ),
        )


def common(kind: str) -> str:
    """What the matrices of all experts of a layer are, of the kind of one."""
    return kind.rpartition(".")[0]


def reads_stream(kind: str) -> bool:
    """Whether an expert's matrix reads the stream, as those of the other experts do; else channels of its
    own."""
    return common(kind) != "experts.down_proj"


def abreast(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets of a block in the order of the data, those together of which none sees another's outputs:
    all experts' first matrices, then all their second ones; of the others each alone."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        kind = common(target.kind) if target.routed else target.kind
        found.setdefault(kind, []).append(target)
    return list(found.values())


def run(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, fed: Fed, made: Made) -> Tensor:
    """The experts on hidden (tokens, in), as stock code computes them one by one.

    Args:
        index, weights: (tokens, k), the experts of each token and what their outputs count. An index beyond
            the last expert is no expert.
        fed, made: called before and after each product, that of an expert without tokens (n = 0) included.
            `fed` is also told what all experts' first matrices read, and what their second ones do, under
            their common kinds (`common`).
    """
    first = _first(experts)
    out = torch.zeros_like(hidden)
    fed(f"experts.{first}", hidden[None], torch.arange(len(hidden), device=hidden.device))
    for e in range(experts.down_proj.shape[0]):
        rows, place = torch.where(index == e)
        x = hidden[rows]
        fed(f"experts.{first}.{e}", x[None], rows)
        inside = products.linear(x, experts.get_parameter(first)[e])
        made(f"experts.{first}.{e}", inside)
        inside = experts._apply_gate(inside) if experts.has_gate else experts.act_fn(inside)
        fed("experts.down_proj", inside[None], rows)
        fed(f"experts.down_proj.{e}", inside[None], rows)
        part = products.linear(inside, experts.down_proj[e])
        made(f"experts.down_proj.{e}", part)
        out = out.index_add(0, rows, (part * weights[rows, place, None]).to(out.dtype))
    return out


def _first(experts: Any) -> str:
    """The matrix that reads the stream: gate and up in one, or up alone."""
    return "gate_up_proj" if experts.has_gate else "up_proj"
