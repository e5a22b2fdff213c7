"""The kernels' doors refuse, by its name, every argument that they cannot compute with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels.chunked import ssd_chunked
from sparsessm.kernels.matrix import Decoder, Matrix
from sparsessm.kernels.ssd import ssd_scan

needs_native = pytest.mark.skipif(not kernels.NATIVE, reason="needs the native kernels")


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


ROW = (2, 5, 4)
SCAN = tensors(u=ROW, delta=ROW, A=(4, 3), B=(2, 5, 3), C=(2, 5, 3), D=(4,), z=ROW, initial_state=(2, 4, 3))
CONV = tensors(x=ROW, weight=(4, 3), bias=(4,), before=(2, 2, 4))
HEADS = (2, 5, 4, 3)
SSD = tensors(
    u=HEADS, delta=(2, 5, 4), A=(4,), B=(2, 5, 2, 3), C=(2, 5, 2, 3), D=(4,), initial_state=(2, 4, 3, 3)
)
STATS = SCAN | tensors(removed_state=(2, 4, 3))
DOORS: Mapping[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]] = {
    "selective_scan": (kernels.selective_scan, SCAN, {}),
    "selective_scan_stats": (kernels.selective_scan_stats, STATS, {"removed": "unit", "gram": "full"}),
    "selective_scan_backward": (kernels.selective_scan_backward, SCAN | tensors(dy=ROW), {}),
    "causal_conv1d": (kernels.causal_conv1d, CONV, {"silu": True}),
    "causal_conv1d_backward": (kernels.causal_conv1d_backward, CONV | tensors(dy=ROW), {"silu": True}),
    "ssd_scan": (ssd_scan, SSD, {"every": 2}),
    "ssd_chunked": (ssd_chunked, SSD, {"chunk": 2}),
}
OTHERS: Mapping[str, tuple[Callable[[Tensor], Any], str]] = {
    "complex": (lambda x: x.to(torch.complex64), "is torch.complex64; allowed: float16"),
    "complex half": (lambda x: x.to(torch.complex32), "is torch.complex32; allowed: float16"),
    "integer": (lambda x: x.to(torch.int64), "is torch.int64; allowed: float16"),
    "bytes": (lambda x: x.to(torch.uint8), "is torch.uint8; allowed: float16"),
    "bool": (lambda x: x > 0.5, "is torch.bool; allowed: float16"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn; allowed: float16"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is torch.qint8; allowed"),
    "sparse": (lambda x: x.to_sparse(), "is a sparse tensor; a dense one is needed"),
    "nested": (lambda x: torch.nested.as_nested_tensor(list(x)), "is a nested tensor; a dense one is needed"),
    "another device": (lambda x: x.to("meta"), "must be on one device"),
    "array": (lambda x: x.numpy(), "is of type ndarray; a tensor is needed"),
    "number": (lambda x: 1.0, "is of type float; a tensor is needed"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*quantiz", "ignore:.*ComplexHalf")
@pytest.mark.parametrize("level", ["reference", kernels.LEVEL])
@pytest.mark.parametrize("door", DOORS)
def test_every_argument_is_checked(door: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEVEL", level)
    call, sound, options = DOORS[door]
    call(**sound, **options)
    for name, tensor in sound.items():
        for kind, (other, message) in OTHERS.items():
            if kind == "nested" and tensor.ndim < 2:
                continue
            with pytest.raises((TypeError, ValueError)) as refusal:
                call(**(sound | {name: other(tensor)}), **options)
            told = str(refusal.value)
            assert message in told and "\n" not in told, (name, kind, told)
            first = kind == "another device" and name == next(iter(sound))
            assert told.startswith(f"{name} ") or first, (name, kind, told)


@pytest.mark.parametrize("door", DOORS)
def test_real_dtypes_may_differ(door: str) -> None:
    """Each argument in another dtype than the rest: the result of its rounded value."""
    call, sound, options = DOORS[door]
    for name, tensor in sound.items():
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            got = call(**(sound | {name: tensor.to(dtype)}), **options)
            want = call(**(sound | {name: tensor.to(dtype).float()}), **options)
            pairs = zip(flat(got), flat(want), strict=True)
            assert all((a.double() - b.double()).abs().max() < 0.05 for a, b in pairs), (name, dtype)


def flat(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [
        part for one in results for part in (one if isinstance(one, tuple) else (one,)) if part is not None
    ]


@needs_native
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*quantiz", "ignore:.*ComplexHalf")
@pytest.mark.parametrize("kind", OTHERS)
def test_matrices(kind: str) -> None:
    other, _ = OTHERS[kind]
    weight, mask = torch.rand(3, 8), torch.full((3, 1), 255, dtype=torch.uint8)
    made, bits = Matrix.dense(weight), torch.ones(3, 8, dtype=torch.int8)
    decoder = Decoder.__new__(Decoder)
    decoder.vocabulary, decoder.state_size = 4, 3
    calls: dict[str, Callable[[], Any]] = {
        "values": lambda: Matrix.dense(other(weight)),
        "values ": lambda: Matrix.packed(mask, 8, other(weight.flatten())),
        "scale": lambda: Matrix.dense(bits, other(torch.rand(3))),
        "x": lambda: made.linear(other(torch.rand(2, 8))),
        "bias": lambda: made.linear(torch.rand(2, 8), other(torch.rand(3))),
        "state": lambda: decoder.step(torch.zeros(2, dtype=torch.int64), other(torch.rand(2, 3)), 1),
    }
    if kind not in ("integer", "nested"):
        calls["tokens"] = lambda: decoder.step(other(torch.rand(2)), torch.rand(2, 3), 1)
        calls["rows"] = lambda: Matrix.packed(mask, 8, weight.flatten(), rows=other(torch.rand(3)))
    if kind != "bytes":
        calls["mask"] = lambda: Matrix.packed(other(torch.rand(3, 1)), 8, weight.flatten())
    for name, call in calls.items():
        if kind == "nested" and name in ("values ", "scale", "bias"):
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{name.strip()} is "):
            call()


def test_a_model_without_values_has_shapes() -> None:
    """All on the device `meta`: the form for other devices says which shapes come out."""
    for door, (call, sound, options) in DOORS.items():
        got = flat(call(**{name: tensor.to("meta") for name, tensor in sound.items()}, **options))
        want = flat(call(**sound, **options))
        assert [one.shape for one in got] == [one.shape for one in want], door
        assert all(one.device.type == "meta" for one in got), door
