"""Whole units out of a model: what is left computes what the full model computes with those units masked, in
the STOCK forward; and the loop that chooses, cuts and repairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from torch import Tensor, nn
from torch.nn import functional as F
from transcription import block_influence
from transformers import AutoModelForCausalLM

from sparsessm.architectures import Architecture, adapt
from sparsessm.architectures.base import cut
from sparsessm.calibration.loss import losses
from sparsessm.methods import unit_methods
from sparsessm.pruning import blocks
from sparsessm.pruning import units as structure
from sparsessm.pruning.units import shrink
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import Order, order

UNITS = unit_methods()

TOKENS = torch.randint(0, 64, (4, 21), generator=torch.Generator().manual_seed(0))
Keeps = list[list[Tensor]]  # of each layer, of each of its axes of one name


def lively(model: Any) -> Any:
    """Weights of size one: pico models hardly hear their mixers, and a mask would hardly show."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.backbone.layers.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "proj.weight" in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            elif "A_log" not in name:
                parameter.add_(0.3 * noise)
    return model


def mamba(**how: Any) -> Any:
    return lively(pico_mamba(time_step_rank=3, **how))


def falcon(**how: Any) -> Any:
    return lively(pico_falcon_mamba(time_step_rank=3, **how))


def mamba2(**how: Any) -> Any:
    """8 heads of 8 channels: 4 x 16 channels, of which halves and quarters may stay."""
    shapes = {"num_heads": 8, "head_dim": 8, "expand": 4, "n_groups": 1}
    return lively(pico_mamba2(**{**shapes, **how}))


def stock(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# the reference: the full model, its units without any influence


class KeptNorm(nn.Module):
    """RMS norm without weights that counts the kept entries only."""

    def __init__(self, keep: Tensor, eps: float) -> None:
        super().__init__()
        self.keep, self.eps = keep, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.keep
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.keep.sum() + self.eps)


class KeptGatedNorm(nn.Module):
    """Mamba-2's gated norm, which divides each group by the root mean square of its kept channels."""

    def __init__(self, norm: Any, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.group_size = (
            norm.weight,
            norm.variance_epsilon,
            norm.group_size,
        )
        self.keep = keep.unflatten(0, (-1, norm.group_size))  # (G, D / G)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = (x * F.silu(gate)).unflatten(-1, tuple(self.keep.shape)) * self.keep
        power = x.square().sum(-1, keepdim=True) / self.keep.sum(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(power + self.variance_epsilon)).flatten(-2)


def silence(mixer: Any, axis: str, keeps: Sequence[Tensor]) -> None:
    """Take all influence from the units that are not kept; the shapes stay."""
    with torch.no_grad():
        if not hasattr(mixer, "num_heads"):
            _silence_mamba1(mixer, axis, keeps[0])
        else:
            _silence_mamba2(mixer, axis, keeps)


def _silence_mamba1(mixer: Any, axis: str, keep: Tensor) -> None:
    if axis == "channel":
        mixer.x_proj.weight[:, ~keep] = 0.0
        mixer.out_proj.weight[:, ~keep] = 0.0
        return
    readout = mixer.x_proj.weight[-mixer.ssm_state_size :]
    readout[~keep] = 0.0
    if hasattr(mixer, "c_layernorm"):
        mixer.b_layernorm, mixer.c_layernorm = KeptNorm(keep, mixer.rms_eps), KeptNorm(keep, mixer.rms_eps)


def _silence_mamba2(mixer: Any, axis: str, keeps: Sequence[Tensor]) -> None:
    groups, heads, states = mixer.n_groups, mixer.num_heads, mixer.ssm_state_size
    inner = mixer.intermediate_size
    if axis == "state":
        readouts = inner + groups * states + (~torch.cat(list(keeps))).nonzero()[:, 0]  # among conv's rows
        mixer.in_proj.weight[inner + readouts] = 0.0
        mixer.conv1d.weight[readouts] = 0.0
        for rows, linear in ((inner + readouts, mixer.in_proj), (readouts, mixer.conv1d)):
            if linear.bias is not None:
                linear.bias[rows] = 0.0
        return
    keep = torch.cat(list(keeps))
    if axis == "head":
        keep = keep.repeat_interleave(inner // heads)
    old = getattr(mixer.norm, "keep", None)
    keep = keep if old is None else keep & old.flatten()
    mixer.out_proj.weight[:, ~keep] = 0.0
    mixer.norm = KeptGatedNorm(mixer.norm, keep)


def drawn(architecture: Architecture, axis: str, size: int, seed: int = 0) -> Keeps:
    """Keep-masks of every layer's axes, each its own."""
    random = torch.Generator().manual_seed(seed)
    keeps: Keeps = []
    for block in architecture.blocks:
        keeps.append([])
        for one in block.axes:
            if one.name == axis:
                keep = torch.zeros(one.size, dtype=torch.bool)
                keep[torch.randperm(one.size, generator=random)[:size]] = True
                keeps[-1].append(keep)
    return keeps


def take_out(architecture: Architecture, axis: str, size: int, keeps: Keeps) -> None:
    fields = architecture.fields({axis: size})
    for block, masks in zip(architecture.blocks, keeps, strict=True):
        axes = [one for one in block.axes if one.name == axis]
        made = architecture.resize(block, fields, cut(block.layer.state_dict(), axes, masks))
        assert architecture.blocks[block.index] is made
        assert all(one.size == size for one in made.axes if one.name == axis)
    architecture.settle(fields)


BIASES: list[dict[str, Any]] = [
    {},
    {"use_bias": True, "use_conv_bias": True},
    {"use_bias": True, "use_conv_bias": False},
    {"use_conv_bias": False, "conv_kernel": 2},
]
ODD = {"hidden_size": 12, "expand": 3, "state_size": 7}
TWO = {"n_groups": 2}
FOUR = {"n_groups": 4, "state_size": 5}
# Half the channels of heads of 6 in a stream of 12: 12 heads x 3 = 36
ODD2 = {"hidden_size": 12, "expand": 6, "num_heads": 12, "head_dim": 6, "state_size": 3, "n_groups": 3}
CASES: list[tuple[Callable[..., Any], dict[str, Any], str, int]] = [
    (mamba, {}, "state", 5),
    (mamba, ODD, "state", 1),
    (mamba, {}, "channel", 16),
    (mamba, ODD, "channel", 5),
    (mamba, {"tie_word_embeddings": False, "hidden_size": 8}, "channel", 1),
    (falcon, {}, "state", 5),
    (falcon, ODD, "state", 1),
    (falcon, {}, "channel", 16),
    (falcon, ODD, "channel", 5),
    (mamba2, {}, "state", 5),
    (mamba2, TWO, "state", 3),
    (mamba2, FOUR, "state", 1),
    (mamba2, {}, "head", 4),
    (mamba2, TWO, "head", 1),
    (mamba2, TWO, "head", 3),
    (mamba2, FOUR, "head", 1),
    (mamba2, {}, "channel", 4),
    (mamba2, TWO, "channel", 2),
    (mamba2, FOUR, "channel", 6),
    (mamba2, ODD2, "head", 2),
    (mamba2, ODD2, "channel", 3),
    (mamba2, ODD2, "state", 2),
]


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{name}={one}" for name, one in value.items()) or "plain"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("biases", BIASES, ids=_name)
@pytest.mark.parametrize(("make", "shapes", "axis", "size"), CASES, ids=_name)
def test_a_smaller_model_is_the_full_one_with_units_silenced(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, size: int, biases: dict[str, Any]
) -> None:
    full = make(**shapes, **biases)
    small = copy.deepcopy(full)
    architecture = adapt(small)
    keeps = drawn(architecture, axis, size)
    dense = stock(full)
    for layer, masks in zip(full.backbone.layers, keeps, strict=True):
        silence(layer.mixer, axis, masks)
    take_out(architecture, axis, size, keeps)
    want, got = stock(full), stock(small)
    assert difference(want, dense) > 1e-2, "units that nobody hears prove nothing"
    assert difference(got, want) <= 1e-5
    assert difference(architecture.logits(TOKENS), got) <= 1e-5
    assert difference(adapt(small).logits(TOKENS), got) <= 1e-5
    anew = type(small)(copy.deepcopy(small.config)).eval()
    anew.load_state_dict(small.state_dict())
    assert torch.equal(stock(anew), got)


@pytest.mark.parametrize(
    ("make", "shapes", "axis", "size"), [CASES[i] for i in (0, 3, 8, 10, 12, 17)], ids=_name
)
def test_a_smaller_model_comes_back_from_its_files(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, size: int, tmp_path: Path
) -> None:
    """By stock code alone: the configuration in the file says all shapes."""
    model = make(**shapes)
    architecture = adapt(model)
    take_out(architecture, axis, size, drawn(architecture, axis, size))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(loaded), stock(model))


@pytest.mark.parametrize(
    ("make", "shapes", "sizes"),
    [
        (mamba, {}, {"channel": 16, "state": 3}),
        (falcon, ODD, {"state": 2, "channel": 7}),
        (mamba2, TWO, {"head": 2, "state": 3}),
        (mamba2, TWO, {"channel": 4, "state": 3, "head": 2}),
        (mamba2, {**FOUR, "hidden_size": 8, "expand": 8}, {"channel": 6, "head": 1, "state": 1}),
    ],
    ids=_name,
)
def test_several_axes_one_after_the_other(
    make: Callable[..., Any], shapes: dict[str, Any], sizes: dict[str, int]
) -> None:
    full = make(**shapes, use_bias=True)
    small = copy.deepcopy(full)
    architecture, reference = adapt(small), adapt(full)
    for seed, (axis, size) in enumerate(sizes.items()):
        every = drawn(reference, axis, size, seed)  # in the numbers of the full model
        for layer, masks in zip(full.backbone.layers, every, strict=True):
            silence(layer.mixer, axis, masks)
        here = [
            masks[: sum(one.name == axis for one in block.axes)]
            for block, masks in zip(architecture.blocks, every, strict=True)
        ]
        take_out(architecture, axis, size, here)
    if "channel" in sizes and "head" in sizes:
        assert list(sizes).index("channel") < list(sizes).index("head"), "heads take their channels along"
    assert difference(stock(small), stock(full)) <= 1e-5
    assert difference(architecture.logits(TOKENS), stock(small)) <= 1e-5
    anew = type(small)(copy.deepcopy(small.config)).eval()
    anew.load_state_dict(small.state_dict())
    assert torch.equal(stock(anew), stock(small))


def test_cutting_leaves_the_tensors_given_alone() -> None:
    model = mamba()
    architecture = adapt(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = architecture.blocks[0]
    axes = [one for one in block.axes if one.name == "state"]
    smaller = cut(block.layer.state_dict(), axes, [torch.arange(8) % 2 == 0])
    assert smaller["mixer.x_proj.weight"].shape == (3 + 8, 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    copied = block.copy()
    architecture.resize(block, {"state_size": 4}, smaller)
    assert copied.axes[0].size == 8 and model.config.state_size == 8, "the config waits for settle"


def test_a_new_layer_draws_nothing_from_the_global_generator() -> None:
    architecture = adapt(mamba())
    before = torch.get_rng_state()
    take_out(architecture, "state", 2, drawn(architecture, "state", 2))
    assert torch.equal(torch.get_rng_state(), before)
    layer = architecture.blocks[0].layer
    assert not layer.training and all(
        parameter.requires_grad == architecture.blocks[1].layer.mixer.D.requires_grad
        for parameter in layer.parameters()
    )


# blocks


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
@pytest.mark.parametrize("gone", [[0], [4], [2, 0], [0, 0, 0, 0], [3, 1]])
def test_a_dropped_block_is_an_entry_less_in_the_list_of_layers(
    make: Callable[..., Any], gone: list[int]
) -> None:
    model = make(num_hidden_layers=5, tie_word_embeddings=False)
    left = copy.deepcopy(model)
    stored = {name: (name, 0) for name in model.state_dict()}  # anything that says where it was
    architecture = adapt(model, stored)  # pyright: ignore[reportArgumentType]
    numbers = list(range(5))
    for index in gone:
        architecture.drop(index)
        del left.backbone.layers[index]
        del numbers[index]
    left.config.num_hidden_layers = len(numbers)
    assert torch.equal(stock(model), stock(left))
    assert difference(architecture.logits(TOKENS), stock(left)) <= 2e-5
    assert model.config.num_hidden_layers == len(numbers) == len(architecture.blocks)
    for now, block in enumerate(architecture.blocks):
        layer = model.backbone.layers[now]
        assert block.layer is layer and block.index == now and layer.mixer.layer_idx == now
        assert block.name == f"backbone.layers.{now}" and {target.layer for target in block.targets} == {now}
    want = {
        name.replace(f"layers.{was}.", f"layers.{now}."): (name, 0)
        for now, was in enumerate(numbers)
        for name in stored
        if f"layers.{was}." in name
    } | {name: value for name, value in stored.items() if "layers." not in name}
    assert dict(architecture.stored) == want and want.keys() == model.state_dict().keys()
    for target in architecture.targets:
        assert target.stored == want[target.name], "each target rounds to the dtype of its own weights"
    assert architecture.tail.index == len(numbers)


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
def test_a_model_without_some_blocks_generates_with_a_cache(make: Callable[..., Any]) -> None:
    """A layer number that did not move up would read another layer's state."""
    model = make(num_hidden_layers=4)
    architecture = adapt(model)
    architecture.drop(2)
    architecture.drop(0)
    fed = TOKENS[:2, :9]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(fed)  # or token 0 would be taken for padding
    cached, plain = (model.generate(fed, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 17)
    for _ in range(3):  # greedy, by hand
        fed = torch.cat([fed, stock(model, fed)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached[:, :12], fed)


def test_the_head_s_layer_number_moves_up_with_the_blocks() -> None:
    architecture = adapt(mamba())
    architecture.drop(0)
    assert architecture.tail.targets[0].layer == architecture.tail.index == 1


# shrink


def ordered(architecture: Architecture, **recipe: Any) -> Any:
    return order(Recipe(**recipe), architecture)


SHRINKS = [
    (make, axis, method)
    for make, axes in ((mamba, ("state", "channel", "block")), (falcon, ("state", "channel", "block")),
                       (mamba2, ("state", "head", "channel", "block")))
    for axis in axes
    for method, row in UNITS.items()
    if axis in row.axes and not row.projects and not (make is mamba2 and method == "sparsessm-vote")
]  # fmt: skip


@pytest.mark.parametrize("repair", ["none", "dense-target", "dense-target:0.5"])
@pytest.mark.parametrize(("make", "axis", "method"), SHRINKS, ids=_name)
def test_every_axis_selection_and_repair(
    make: Callable[..., Any], axis: str, method: str, repair: str
) -> None:
    """Sizes, rows, what is left alone; the same bits twice; and a stock model."""
    model = make(num_hidden_layers=3, tie_word_embeddings=False, **(TWO if make is mamba2 else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share = 1 / 3 if axis == "block" else 0.5
    runs = []
    for _ in range(2):
        architecture = adapt(copy.deepcopy(model))
        was = {one.name: one.size for one in architecture.blocks[0].axes} | {"block": 3}
        wanted = ordered(
            architecture, pattern=f"structured:{axis}", method=method, repair=repair, sparsity=share
        )
        rows = shrink(architecture, wanted, TOKENS)
        runs.append((rows, architecture.model.state_dict()))
    (rows, state), (again, other) = runs
    assert rows == again and state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for name in ("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"):
        assert torch.equal(state[name], before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    size = wanted.sizes[axis]
    assert size == round(was[axis] * (1 - share))
    if axis == "block":
        assert [(row.target, row.total, row.pruned) for row in rows] == [("blocks", 3, 1)]
        assert len(architecture.blocks) == architecture.model.config.num_hidden_layers == 2
    else:
        count = sum(one.name == axis for one in adapt(model).blocks[0].axes)
        for index, row in enumerate(rows):
            assert (row.target, row.layer, row.family) == (f"backbone.layers.{index}.{axis}", index, axis)
            assert (row.total, row.pruned) == (count * was[axis], count * (was[axis] - size))
            assert (row.pattern, row.method, row.removed) == (f"structured:{axis}", method, "cut")
            assert row.repair == {"dense-target": "dense-target:1"}.get(repair, repair)
        assert len(rows) == 3
        for block in architecture.blocks:
            assert {one.size for one in block.axes if one.name == axis} == {size}
    got = stock(architecture.model)
    assert torch.isfinite(got).all() and difference(architecture.logits(TOKENS), got) <= 1e-5
    anew = type(model)(copy.deepcopy(architecture.model.config)).eval()
    anew.load_state_dict(state)
    assert torch.equal(stock(anew), got)


@pytest.mark.parametrize("make", [mamba, mamba2])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_what_looks_at_nothing_needs_no_windows(make: Callable[..., Any], method: str) -> None:
    found = []
    for tokens in (None, TOKENS):
        architecture = adapt(make())
        how = {"pattern": "structured:state", "method": method, "repair": "none"}
        wanted = ordered(architecture, **how)
        assert not wanted.looks
        shrink(architecture, wanted, tokens)
        found.append(architecture.model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    "how", [{}, {"method": "exact", "repair": "none"}, {"method": "magnitude"}, {"pattern": "structured"}]
)
def test_what_looks_is_refused_without_windows(how: dict[str, Any]) -> None:
    architecture = adapt(mamba())
    before = stock(architecture.model)
    wanted = ordered(architecture, **{"pattern": "structured:state"} | how)
    assert wanted.looks
    with pytest.raises(ValueError, match="needs calibration windows, none were given"):
        shrink(architecture, wanted, None)
    assert torch.equal(stock(architecture.model), before)


def norms(mixer: Any, axis: str) -> list[Tensor]:
    """Squared norm of each unit's rows and columns in all matrices, of each axis."""
    w = {name: value.detach().double() for name, value in mixer.named_parameters()}
    conv = w["conv1d.weight"][:, 0].square().sum(1)
    if not hasattr(mixer, "num_heads"):
        channels, states = w["A_log"].shape
        if axis == "state":
            B, C = w["x_proj.weight"][-2 * states : -states], w["x_proj.weight"][-states:]
            return [B.square().sum(1) + C.square().sum(1) + w["A_log"].square().sum(0)]
        x, z = w["in_proj.weight"].square().sum(1).split(channels)
        matrices = w["dt_proj.weight"].square().sum(1) + w["A_log"].square().sum(1)
        columns = w["x_proj.weight"].square().sum(0) + w["out_proj.weight"].square().sum(0)
        return [x + z + conv + matrices + columns]
    D, GN, H = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size, mixer.num_heads
    z, x, B, C, dt = w["in_proj.weight"].square().sum(1).split([D, D, GN, GN, H])
    conv_x, conv_B, conv_C = conv.split([D, GN, GN])
    if axis == "state":
        return list((B + C + conv_B + conv_C).split(mixer.ssm_state_size))
    channel = z + x + conv_x + w["out_proj.weight"].square().sum(0)
    if axis == "channel":
        return list(channel.split(D // H))
    return list((channel.unflatten(0, (H, -1)).sum(1) + dt).split(H // mixer.n_groups))


@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, ODD, "channel"), (falcon, {}, "channel"), (falcon, ODD, "state"),
     (mamba2, TWO, "state"), (mamba2, TWO, "head"), (mamba2, TWO, "channel"), (mamba2, {}, "head")],
    ids=_name,
)  # fmt: skip
def test_magnitude_keeps_the_units_of_the_largest_norm_and_touches_nothing_else(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str
) -> None:
    full = make(**shapes, use_bias=True)
    small, by_hand = copy.deepcopy(full), copy.deepcopy(full)
    architecture = adapt(small)
    how = {"pattern": f"structured:{axis}", "method": "magnitude", "repair": "none"}
    wanted = ordered(architecture, **how)
    size = wanted.sizes[axis]
    shrink(architecture, wanted, None)
    keeps = []
    for layer in full.backbone.layers:
        keeps.append(
            [norm >= norm.sort(descending=True).values[size - 1] for norm in norms(layer.mixer, axis)]
        )
    take_out(adapt(by_hand), axis, size, keeps)
    got, want = small.state_dict(), by_hand.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for layer, masks in zip(full.backbone.layers, keeps, strict=True):
        silence(layer.mixer, axis, masks)
    assert difference(stock(small), stock(full)) <= 1e-5


def heard(model: Any, layer: int, module: str = "out_proj", tokens: Tensor = TOKENS) -> Tensor:
    """(tokens, in) float64: what the stock forward feeds a linear layer."""
    inputs: list[Tensor] = []
    linear = model.backbone.layers[layer].mixer.get_submodule(module)
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    stock(model, tokens)
    hook.remove()
    return inputs[0].flatten(0, 1).double()


def fitted(X: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """argmin |X V' - target|^2 / n + added |V - start|^2 as one least squares, by SVD."""
    added = 0.01 * X.square().mean(0).mean()
    count = len(X)
    root = (added * count).sqrt() * torch.eye(X.shape[1], dtype=torch.float64)
    A = torch.cat([X, root])
    b = torch.cat([target, root @ start.T])
    return torch.linalg.lstsq(A, b, driver="gelsd").solution.T


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, {}, "channel"), (falcon, {}, "state"), (mamba2, TWO, "state"),
     (mamba2, TWO, "head"), (mamba2, {}, "channel"), (mamba, {"num_hidden_layers": 3}, "block")],
    ids=_name,
)  # fmt: skip
def test_out_proj_is_repaired_by_least_squares(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, strength: float
) -> None:
    """Of the smaller model's inputs on the dense model's outputs, both heard in the stock forward."""
    tokens = torch.randint(0, 64, (8, 40), generator=torch.Generator().manual_seed(2))
    full = make(**shapes, use_bias=True)
    how: dict[str, Any] = {"pattern": f"structured:{axis}", "method": "random", "sparsity": 0.5}
    kept = list(range(len(full.backbone.layers)))
    for seed in range(20):  # until the first block goes, so that all others have something to repair
        small = copy.deepcopy(full)
        architecture = adapt(small)
        how |= {"seed": seed, "sparsity": 0.34} if axis == "block" else {}
        shrink(architecture, ordered(architecture, repair=f"dense-target:{strength}", **how), tokens)
        if axis == "block":
            kept = [index for index in kept if any(
                torch.equal(full.backbone.layers[index].norm.weight, layer.norm.weight)
                for layer in small.backbone.layers)]  # fmt: skip
            if kept != [1, 2]:
                kept = [0, 1, 2]
                continue
        break
    assert len(kept) == len(small.backbone.layers)
    for now, layer in enumerate(kept):
        mixer, repaired = full.backbone.layers[layer].mixer, small.backbone.layers[now].mixer
        weight = mixer.out_proj.weight.detach().double()
        start = weight
        if axis in ("channel", "head"):
            start = weight[:, survivors(mixer, repaired)]
        best = fitted(heard(small, now, tokens=tokens), heard(full, layer, tokens=tokens) @ weight.T, start)
        want = start + strength * (best - start)
        got = repaired.out_proj.weight.detach()
        assert difference(got.double(), want) <= 2e-3
        assert difference(start, want) > 1e-2
        assert torch.equal(repaired.out_proj.bias, mixer.out_proj.bias)


def survivors(full: Any, small: Any) -> Tensor:
    """(D,) bool: channels whose vectors are still there; those of a norm with the factor that it got."""
    if hasattr(full, "num_heads"):
        factor = (len(full.norm.weight) / len(small.norm.weight)) ** 0.5
        distances = (full.norm.weight[:, None] * factor - small.norm.weight).abs().amin(1)
        return distances <= 1e-6 * full.norm.weight.abs()
    return torch.isin(full.D, small.D)


def errors(full: Any, small: Any, tokens: Tensor) -> float:
    """Mean squared difference of the last residual stream."""
    return float((adapt(full).final(tokens) - adapt(small).final(tokens)).square().mean())


@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, {}, "channel"), (falcon, {}, "channel"), (mamba2, TWO, "state"),
     (mamba2, TWO, "head"), (mamba2, {}, "channel")],
    ids=_name,
)  # fmt: skip
def test_exact_with_repair_is_nearer_to_the_dense_model_than_random_without(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str
) -> None:
    tokens = torch.randint(0, 64, (16, 128), generator=torch.Generator().manual_seed(2))
    full, found = make(**shapes), {}
    for method in ("exact", "random"):
        for repair in ("none", "dense-target"):
            architecture = adapt(copy.deepcopy(full))
            how = {"method": method, "repair": repair, "price": "none"}
            shrink(architecture, ordered(architecture, pattern=f"structured:{axis}", **how), tokens)
            found[method, repair] = errors(full, architecture.model, tokens)
    assert found["exact", "dense-target"] < 0.7 * found["random", "none"]
    for method in ("exact", "random"):
        assert found[method, "dense-target"] < found[method, "none"]


def test_states_that_do_nothing_go_first_and_cost_nothing() -> None:
    """C rows of three states are zero: every selection that looks at the states finds them."""
    for method in ("exact", "ghost"):
        full = mamba()
        for layer in full.backbone.layers:
            with torch.no_grad():
                layer.mixer.x_proj.weight[-8:][[1, 4, 6]] = 0.0
        architecture = adapt(copy.deepcopy(full))
        wanted = ordered(
            architecture, pattern="structured:state", sparsity=3 / 8, method=method, repair="none"
        )
        shrink(architecture, wanted, TOKENS)
        assert difference(stock(architecture.model), stock(full)) <= 1e-5
        for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
            assert torch.equal(small.mixer.A_log, layer.mixer.A_log[:, [0, 2, 3, 5, 7]])


def test_a_duplicated_state_costs_nothing_where_readouts_can_be_mixed() -> None:
    """Two states with one decay and one B are one state: its partner's readout takes over, exactly."""
    full = mamba()
    for layer in full.backbone.layers:
        with torch.no_grad():
            layer.mixer.A_log[:, 5] = layer.mixer.A_log[:, 2]
            layer.mixer.x_proj.weight[3 + 5] = layer.mixer.x_proj.weight[3 + 2]
    architecture = adapt(copy.deepcopy(full))
    wanted = ordered(architecture, pattern="structured:state", sparsity=1 / 8, price="none")
    tokens = torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(2))
    shrink(architecture, wanted, tokens)
    for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
        decays = layer.mixer.A_log[:, [n for n in range(8) if n != 5]]
        assert torch.equal(small.mixer.A_log.sort(1).values, decays.sort(1).values), "one of the two went"
    repaired = errors(full, architecture.model, tokens)
    plain = adapt(copy.deepcopy(full))
    shrink(
        plain,
        ordered(plain, pattern="structured:state", sparsity=1 / 8, price="none", repair="none"),
        tokens,
    )
    assert repaired < 0.05 * errors(full, plain.model, tokens)


def test_a_state_that_is_read_alike_costs_nothing_where_inputs_can_be_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two states with one decay and one readout but for a factor are one state with another input."""
    full = mamba()
    for layer in full.backbone.layers:
        with torch.no_grad():
            layer.mixer.A_log[:, 5] = layer.mixer.A_log[:, 2]
            layer.mixer.x_proj.weight[3 + 8 + 5] = -0.7 * layer.mixer.x_proj.weight[3 + 8 + 2]
    tokens = torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(2))
    last = replace(UNITS["random"], score=lambda units: [torch.arange(8).eq(5).logical_not().double()])
    found = []
    for strength, most in ((1.0, structure.MAX_STATES), (1.0, 0), (0.0, 0)):
        monkeypatch.setattr(structure, "MAX_STATES", most)  # 0: readouts alone
        architecture = adapt(copy.deepcopy(full))
        wanted = Order({"state": 7}, {"state": last}, strength=strength, fisher=False)
        shrink(architecture, wanted, tokens)
        for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
            assert torch.equal(small.mixer.A_log, layer.mixer.A_log[:, [0, 1, 2, 3, 4, 6, 7]])
        found.append(errors(full, architecture.model, tokens))
    both, readouts, nothing = found
    assert both < 0.1 * nothing and both < 0.2 * readouts


# blocks


def loss(model: Any, tokens: Tensor) -> float:
    rows = stock(model, tokens)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(rows.double(), tokens[:, 1:].flatten()))


def without(model: Any, gone: Sequence[int]) -> Any:
    left = copy.deepcopy(model)
    left.backbone.layers = nn.ModuleList(
        layer for index, layer in enumerate(left.backbone.layers) if index not in gone
    )
    return left


def speaking(model: Any) -> tuple[Any, Tensor]:
    """A model of five blocks that add much or little to the stream, and text that it knows: its own."""
    with torch.no_grad():
        for layer, size in zip(model.backbone.layers, (20.0, 1e-2, 10.0, 1.0, 1e-3), strict=True):
            layer.mixer.out_proj.weight *= size
        model.backbone.norm_f.weight *= 4
    tokens = torch.randint(0, 64, (300, 1), generator=torch.Generator().manual_seed(3))  # several groups
    for _ in range(16):
        tokens = torch.cat([tokens, stock(model, tokens)[:, -1:].argmax(-1)], 1)
    return model, tokens


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
def test_blocks_go_by_the_stock_loss_without_them(make: Callable[..., Any]) -> None:
    """Greedy, as if all single removals from what is left were tried, where blocks differ as trained ones."""
    model, tokens = speaking(make(num_hidden_layers=5))
    gone: list[int] = []
    for _ in range(2):
        costs = {i: loss(without(model, [*gone, i]), tokens) for i in range(5) if i not in gone}
        gone.append(min(costs, key=lambda i: costs[i]))
    architecture = adapt(copy.deepcopy(model))
    wanted = ordered(architecture, pattern="structured:block", sparsity=0.4, repair="none")
    shrink(architecture, wanted, tokens)
    want = without(model, gone)
    got = architecture.model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.state_dict().items())
    assert torch.equal(stock(architecture.model), stock(want))
    for index, cost in costs.items():
        assert blocks._loss_without(adapt(model), tokens, [gone[0], index]) == pytest.approx(cost, rel=1e-5)
    for index, cost in blocks._each_alone(adapt(model), tokens)[1].items():
        assert cost == pytest.approx(loss(without(model, [index]), tokens), rel=1e-5)
    assert float(losses(adapt(model), tokens).mean()) == pytest.approx(loss(model, tokens))


def test_a_block_that_cannot_win_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks' costs are set far apart, so that after the first turn one question a turn is enough."""
    model, tokens = speaking(mamba(num_hidden_layers=5))
    asked: list[list[int]] = []
    before = blocks._loss_without

    def counted(architecture: Any, tokens: Tensor, gone: Sequence[int]) -> float:
        asked.append(sorted(gone))
        return before(architecture, tokens, gone)

    monkeypatch.setattr(blocks, "_loss_without", counted)
    architecture = adapt(model)
    wanted = ordered(architecture, pattern="structured:block", sparsity=0.6, repair="none")
    gone = blocks.chosen_blocks(architecture, wanted, tokens, None)
    assert set(gone) == {1, 3, 4}
    assert len(asked) < 1 + 4 + 3, "the dense model, then not all that are left in two more turns"


def test_blocks_go_by_how_little_they_turn_the_dense_stream() -> None:
    model = mamba(num_hidden_layers=6)
    costs = {}

    def hook(number: int) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, out: Any) -> None:
            new = out[0] if isinstance(out, tuple) else out
            costs[number] = block_influence(*(x.double().flatten(0, 1).numpy() for x in (args[0], new)))

        return hear

    heard = copy.deepcopy(model)
    for number, layer in enumerate(heard.backbone.layers):
        layer.register_forward_hook(hook(number))
    stock(heard)
    architecture = adapt(copy.deepcopy(model))
    shrink(
        architecture,
        ordered(architecture, pattern="structured:block", method="cosine", repair="none"),
        TOKENS,
    )
    gone = sorted(costs, key=lambda i: costs[i])[:3]
    assert torch.equal(stock(architecture.model), stock(without(model, gone)))


def test_blocks_and_units_together() -> None:
    model = mamba(num_hidden_layers=4)
    architecture = adapt(model)
    wanted = ordered(architecture, pattern="structured:state=0.5,channel=0.5,block=0.25")
    rows = shrink(architecture, wanted, TOKENS)
    assert [row.family for row in rows] == ["block", *["channel", "state"] * 3]
    assert len({row.layer for row in rows[1:]}) == 3, "named after the layers of the dense model"
    assert len(architecture.blocks) == 3
    for block in architecture.blocks:
        assert {one.name: one.size for one in block.axes} == {"state": 4, "channel": 16}
    config = architecture.model.config
    assert (config.state_size, config.intermediate_size, config.num_hidden_layers) == (4, 16, 3)
    assert difference(architecture.logits(TOKENS), stock(model)) <= 1e-5


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_states_are_looked_at_in_the_first_windows(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for them is bounded; what else is seen of a window counts all the same."""
    monkeypatch.setattr(structure, "LOOKED", 3)
    found = []
    for windows in (3, len(TOKENS)):
        architecture = adapt(make())
        wanted = ordered(architecture, pattern="structured:state", price="none")
        shrink(architecture, wanted, TOKENS[:windows])
        found.append(architecture.model.state_dict())
    few, many = found
    assert len(TOKENS) > 3 and all(torch.equal(few[name], tensor) for name, tensor in many.items())


def test_what_is_not_finite_names_the_block() -> None:
    model = mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0] = torch.inf
    for method in ("exact", "magnitude"):
        architecture = adapt(copy.deepcopy(model))
        wanted = ordered(architecture, pattern="structured:channel", method=method, price="none")
        with pytest.raises(ValueError, match="backbone.layers.1"):
            shrink(architecture, wanted, TOKENS)


@pytest.mark.parametrize("seed", range(4))  # one of which takes the last block
def test_progress_ends_where_it_should(seed: int) -> None:
    seen: list[tuple[str, int, int]] = []
    architecture = adapt(mamba(num_hidden_layers=3))
    how = {"method": "random", "seed": seed} if seed else {}
    wanted = ordered(architecture, pattern="structured:state=0.5,block=0.33", **how)
    shrink(architecture, wanted, TOKENS, lambda *what: seen.append(what))
    last = {stage: (done, total) for stage, done, total in seen}
    assert all(done == total for done, total in last.values()), last
    assert last.keys() == ({"shrink"} if seed else {"fisher", "blocks", "shrink"})
