"""Layers of Mamba-1 and FalconMamba of different widths: both engines against the stock model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engines import Make, assert_rows_are_alone, both, last_bits, native, needs_native
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from torch import Tensor

from sparsessm import kernels, runtime
from sparsessm.checkpoint.encoding import Encoded, encode
from sparsessm.kernels.matrix import Decoder, rounded
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.plan import Mamba
from sparsessm.runtime.reference import ReferenceEngine, expected_shapes
from sparsessm.runtime.weights import LANES

LINEAR = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
# kind, channels by layer, fields, whether half of the states forget
CASES: dict[str, tuple[Any, list[int], dict[str, Any], bool]] = {
    "narrow, wide": (pico_mamba, [16, 40], {}, False),
    "odd, one": (pico_mamba, [33, 1], {}, True),
    "one, odd, biases": (pico_mamba, [1, 33], {"use_bias": True}, True),
    "three, untied": (pico_mamba, [64, 16, 48], {"tie_word_embeddings": False}, True),
    "falcon": (pico_falcon_mamba, [16, 40], {}, True),
    "falcon, biases": (pico_falcon_mamba, [64, 16, 48], {"use_bias": True}, False),
    "one tap": (pico_mamba, [20, 75], {"conv_kernel": 1}, True),
    "no bias of the convolution, 17 states": (
        pico_mamba,
        [5, 70],
        {"use_conv_bias": False, "state_size": 17, "time_step_rank": 3},
        True,
    ),
}


def widened(kind: Any, widths: list[int], forget: bool = False, **fields: Any) -> Any:
    """A pico model whose layer i has widths[i] channels; its configuration says 32, which no layer has."""
    model = kind(num_hidden_layers=len(widths), **fields)
    config: Any = model.config
    random = torch.Generator().manual_seed(7)
    for i, width in enumerate(widths):
        own = copy.deepcopy(config)
        own.intermediate_size = width
        layer: Any = type(model.backbone.layers[i])(own, layer_idx=i).eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():  # outside a model some are not even initialised
                draw = torch.randn(parameter.shape, generator=random)
                parameter.copy_(draw / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1 * draw)
                if name.endswith((".D", "norm.weight")):
                    parameter.add_(1.0)
            a_log = layer.mixer.A_log
            a_log.copy_(torch.arange(1, a_log.shape[1] + 1).log() + 0.1 * a_log)
            if forget:
                a_log[torch.rand(a_log.shape, generator=random) < 0.5] = 38.0
        model.backbone.layers[i] = layer
    assert config.intermediate_size not in widths
    return model


def made(case: str) -> Any:
    kind, widths, fields, forget = CASES[case]
    return widened(kind, widths, forget, **fields)


def halved(model: Any) -> Any:
    """The same with half of every linear weight removed."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(LINEAR):
                weight[weight.abs() < weight.abs().median()] = 0.0
    return model


def encoded(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Encoded]:
    """As `packed.pack` encodes, linear weights in float32, bfloat16 or int8."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        linear = name.endswith(LINEAR)
        int8 = linear and dtype == torch.int8 and "dt_proj" not in name
        value = tensor.bfloat16() if linear and dtype == torch.bfloat16 else tensor
        removed = (0.0, 38.0) if name.endswith("A_log") else (0.0,)
        found[name] = encode(name, value, int8=int8, removed=removed)
    return found


def decoded(tensors: dict[str, Encoded]) -> dict[str, Tensor]:
    return {name: tensor.decode(torch.float32) for name, tensor in tensors.items()}


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def stock(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None], use_cache=False).logits[0]


def near(found: Tensor, expected: Tensor, bound: float = 1e-4) -> bool:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) < bound


def levels() -> tuple[str, ...]:
    return tuple(kernels.LEVELS[1:])


@both
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_stock_models(make: Make, case: str) -> None:
    model = made(case)
    ids = tokens(70)
    expected, engine = stock(model, ids), make(model)
    read, stepped, cut = engine.new_state(1), engine.new_state(1), engine.new_state(1)
    bound = max(1e-4, 8 * last_bits(model, ids))
    assert bound < 1e-2  # else the case shows nothing
    assert near(engine.prompt(ids, read[0], every=True), expected, bound)
    assert near(torch.cat([engine.step(token[None], stepped) for token in ids]), expected, bound)
    assert near(engine.prompt(ids[:9], cut[0]), expected[8], bound)
    assert near(engine.prompt(ids[9:], cut[0]), expected[-1], bound)
    assert near(stepped, read, bound) and near(cut, read, bound)


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_every_level_and_number_of_threads(case: str) -> None:
    model = halved(made(case))
    ids = tokens(40)
    expected = stock(model, ids)
    for level in levels():
        kernels.LEVEL = level
        alone = torch.empty(0)
        for threads in (1, 2):
            engine = NativeEngine(model.config, encoded(model), threads)
            state, read = engine.new_state(1), engine.new_state(1)
            rows = torch.cat([engine.step(token[None], state) for token in ids])
            assert near(rows, expected), level
            assert near(engine.prompt(ids, read[0], every=True), expected) and near(read, state), level
            assert threads == 1 or torch.equal(rows, alone), level
            alone = rows


@both
@pytest.mark.parametrize("case", ["odd, one", "three, untied", "falcon"])
def test_a_row_of_a_step_is_bit_for_bit_what_it_is_alone(make: Make, case: str) -> None:
    model = made(case)
    for level in levels() if kernels.LEVEL != "reference" else (kernels.LEVEL,):
        kernels.LEVEL = level
        engine = make(model)
        most = 2 if make is native else 1  # a BLAS's sums may depend on them
        assert_rows_are_alone(
            engine,
            lambda n, seed: tokens(n, seed=seed),
            5,
            lambda n, most=most: torch.set_num_threads(min(n, most)),
        )


class Rounding(ReferenceEngine):
    """The definition, where what meets int8 weights has 8 bits as well."""

    def __init__(self, config: Any, tensors: dict[str, Encoded]) -> None:
        super().__init__(config, decoded(tensors))
        self._narrow = {name for name, tensor in tensors.items() if tensor.scale is not None}

    def _linear(self, mixer: Mamba, name: str, x: Tensor) -> Tensor:
        int8 = f"{mixer.name}.{name}.weight" in self._narrow
        return super()._linear(mixer, name, rounded(x) if int8 else x)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "half of the weights"])
@pytest.mark.parametrize("case", ["one, odd, biases", "three, untied", "falcon"])
def test_packed_weights_are_read_as_what_they_say(case: str, sparse: bool, dtype: torch.dtype) -> None:
    model = halved(made(case)) if sparse else made(case)
    tensors, ids = encoded(model, dtype), tokens(30)
    truth = Rounding(model.config, tensors)
    expected = truth.prompt(ids, truth.new_state(1)[0], every=True)
    bound = 2e-2 if dtype == torch.int8 else 1e-4  # a sum's last bit may decide how an input is rounded
    for level in levels():
        kernels.LEVEL = level
        engine = NativeEngine(model.config, tensors, 2)
        state, read = engine.new_state(2), engine.new_state(1)
        rows = torch.stack([engine.step(token.expand(2), state) for token in ids])
        assert torch.equal(rows[:, 0], rows[:, 1])
        assert near(rows[:, 0], expected, bound), level
        assert near(engine.prompt(ids, read[0], every=True), expected, bound), level


@needs_native
def test_fewer_channels_are_a_smaller_state_and_fewer_bytes() -> None:
    for case, (_, widths, _, _) in CASES.items():
        model = made(case)
        config: Any = model.config
        past, states, expected = config.conv_kernel - 1, config.state_size, 0
        for layer, width in zip(model.backbone.layers, widths, strict=True):
            kept = (layer.mixer.A_log < 38).sum(1).sort().values.tolist()
            assert len(kept) == width
            expected += past * width
            expected += sum(LANES * max(kept[i : i + LANES]) for i in range(0, width, LANES))
        engine = NativeEngine(config, encoded(model))
        assert engine.state_size == expected and engine.new_state(3).shape == (3, expected)
        reference = ReferenceEngine(config, model.state_dict())
        assert reference.state_size == sum((past + states) * width for width in widths)
        floats = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
        looked_up = 0 if config.tie_word_embeddings else floats["backbone.embeddings.weight"]
        assert reference.nbytes == sum(floats.values()) - looked_up
    sizes = [
        NativeEngine(m.config, encoded(m)).nbytes for m in (widened(pico_mamba, [64, 64]), made("odd, one"))
    ]
    assert sizes[0] > sizes[1]


def test_what_an_engine_runs_does_not_depend_on_the_configurations_number() -> None:
    model = made("three, untied")
    ids, tensors = tokens(20), encoded(model)
    found = []
    for number in (32, 64, 1, 1000):
        config = copy.deepcopy(model.config)
        config.intermediate_size = number
        for engine in (runtime.engine_of(config, tensors, None), ReferenceEngine(config, decoded(tensors))):
            found.append(engine.prompt(ids, engine.new_state(1)[0], every=True))
    assert all(torch.equal(each, found[i % 2]) for i, each in enumerate(found))
    assert near(found[0], found[1])


@both
def test_a_layout_is_of_one_order_of_widths(make: Make) -> None:
    layouts = {make(widened(pico_mamba, widths)).layout for widths in ([16, 40], [40, 16], [28, 28])}
    assert len(layouts) == 3
    assert make(made("narrow, wide")).layout in layouts


def test_the_shapes_are_those_of_the_model() -> None:
    for case, (_, widths, _, _) in CASES.items():
        model = made(case)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert shapes == expected_shapes(model.config, None, dict(enumerate(widths)))
    plain = pico_mamba()
    assert expected_shapes(plain.config) == expected_shapes(plain.config, {}, {1: 32})
    assert expected_shapes(pico_mamba2().config) == expected_shapes(pico_mamba2().config, {}, {})


def refused(config: Any, weights: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReferenceEngine(config, weights)
    if kernels.LEVEL != "reference":
        with pytest.raises(ValueError, match=words):
            NativeEngine(config, {name: encode(name, weight, int8=False) for name, weight in weights.items()})


@pytest.mark.parametrize("case", ["narrow, wide", "falcon, biases"])
def test_tensors_of_another_width_are_refused_by_name(case: str) -> None:
    model = made(case)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    axes = {"conv1d.weight": 0, "conv1d.bias": 0, "x_proj.weight": 1, "dt_proj.weight": 0, "dt_proj.bias": 0}
    axes |= {"in_proj.weight": 0, "A_log": 0, "out_proj.weight": 1}
    axes |= {"in_proj.bias": 0} if model.config.use_bias else {}
    for tensor, axis in axes.items():
        name = f"backbone.layers.1.mixer.{tensor}"
        for count in (-1, 1):  # too few, too many
            weight = weights[name]
            size = weight.shape[axis]
            wrong = weight.index_select(axis, torch.arange(size + count) % size)
            words = rf"{name} has shape \({', '.join(map(str, wrong.shape))},?\), expected"
            refused(model.config, weights | {name: wrong}, words)
        missing = {other: weight for other, weight in weights.items() if other != name}
        refused(model.config, missing, f"the weights have no {name}")


def test_a_skip_that_tells_no_width_is_refused_by_name() -> None:
    model = made("narrow, wide")
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    name = "backbone.layers.0.mixer.D"
    # the others are what does not fit a D that could be one
    refused(
        model.config, weights | {name: torch.ones(17)}, r"layers\.0\.mixer\.in_proj\.weight has shape \(32,"
    )
    plain = pico_mamba()
    weights = {name: tensor.detach() for name, tensor in plain.named_parameters()}
    for wrong in (torch.ones(32, 1), torch.ones(0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"{name} has shape .*, expected \(32,\)"):
            ReferenceEngine(plain.config, weights | {name: wrong})
    refused(plain.config, weights | {name: torch.ones(17)}, rf"{name} has shape \(17,\), expected \(32,\)")
    del weights[name]
    refused(plain.config, weights, f"the weights have no {name}")


@needs_native
def test_the_decoder_checks_each_layer_against_its_own_width() -> None:
    model = made("one, odd, biases")
    engine: Any = NativeEngine(model.config, encoded(model))
    layers = [layer.native() for layer in engine._parts]
    rest = {"norm": engine._norm, "embedding": engine._embedding, "head": engine._head}
    sizes = {"width": 16, "states": 8, "taps": 4, "vocabulary": 64, "rank": 1, "epsilon": 1e-5}
    assert Decoder(sizes, layers, rest).state_size == engine.state_size
    wrong: dict[str, Any] = {
        name: layers[0][name] for name in ("in_x", "in_z", "x_proj", "dt_proj", "out_proj")
    }
    wrong |= {name: torch.zeros(len(layers[1][name]) - 1) for name in ("conv", "conv_bias", "in_bias", "A")}
    for name in ("dt_bias", "skip"):
        wrong[name] = torch.zeros(32)
    wrong["channel"] = layers[1]["channel"][:32]
    wrong["slots"] = layers[1]["slots"][:2]
    wrong["index"] = layers[1]["index"][:-1]
    for name, part in wrong.items():
        words = "(x_proj|in_x|in_z|out_proj) is" if name == "in_z" else name
        with pytest.raises(ValueError, match=words):
            Decoder(sizes, [layers[0], layers[1] | {name: part}], rest)
        if not name.endswith(("conv_bias", "in_bias")):  # which a layer need not have
            missing = {key: other for key, other in layers[1].items() if key != name}
            with pytest.raises(ValueError, match=f"{name} is missing"):
                Decoder(sizes, [layers[0], missing], rest)
    with pytest.raises(ValueError, match="in_z is missing"):
        Decoder(sizes, [layers[0] | {"in_z": None}], rest)
