"""Mamba-2 models and others of every shape that the engines run, some as structured pruning leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from engines import held
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from torch import Tensor

from sparsessm.architectures import REMOVED_A_LOG
from sparsessm.checkpoint import packed
from sparsessm.runtime.engine import NativeEngine

Change = Callable[[Any], None]


def mixers(model: Any) -> Iterator[Any]:
    for layer in model.backbone.layers:
        yield layer.mixer


def forget(every: int, value: float = REMOVED_A_LOG["memoryless"]) -> Change:
    """Of A_log's heads, or channels, all but every so-manieth; with 1 all of them."""

    def change(model: Any) -> None:
        for number, mixer in enumerate(mixers(model)):
            rows = torch.arange(len(mixer.A_log))
            mixer.A_log.data[(rows + number) % every > 0 if every > 1 else rows >= 0] = value

    return change


def thin(model: Any) -> None:
    """Half of each linear layer's weights."""
    for mixer in mixers(model):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            if hasattr(mixer, name):
                weight = getattr(mixer, name).weight.data
                weight[weight.abs() < weight.abs().median()] = 0.0


Case = tuple[Callable[..., Any], dict[str, Any], list[Change]]
WIDE = {"hidden_size": 72, "num_heads": 3, "head_dim": 48, "n_groups": 1, "state_size": 20}
CASES: dict[str, Case] = {
    "2 groups": (pico_mamba2, {}, []),
    "one group": (pico_mamba2, {"n_groups": 1}, []),
    "as many groups as heads": (pico_mamba2, {"n_groups": 4}, []),
    "tied": (pico_mamba2, {"tie_word_embeddings": True}, []),
    "biases": (pico_mamba2, {"use_bias": True}, [forget(2)]),
    "no bias of the convolution": (pico_mamba2, {"use_conv_bias": False}, []),
    "one tap": (pico_mamba2, {"conv_kernel": 1}, [forget(2)]),
    "two taps": (pico_mamba2, {"conv_kernel": 2}, []),
    "bounded step sizes": (pico_mamba2, {"time_step_limit": (0.02, 0.1)}, []),
    "one state": (pico_mamba2, {"state_size": 1}, []),
    "odd sizes": (
        pico_mamba2,
        {"hidden_size": 15, "num_heads": 6, "head_dim": 5, "n_groups": 3, "state_size": 7},
        [thin, forget(3)],
    ),
    "heads of 48 channels": (pico_mamba2, WIDE, [thin]),
    "one head of 67 channels": (
        pico_mamba2,
        {"hidden_size": 67, "expand": 1, "num_heads": 1, "head_dim": 67, "n_groups": 1, "state_size": 12},
        [thin],
    ),
    "heads of one channel": (pico_mamba2, {"num_heads": 32, "head_dim": 1, "n_groups": 2}, [forget(5)]),
    "heads without memory": (pico_mamba2, {}, [forget(2)]),
    "no head with memory": (pico_mamba2, {}, [forget(1)]),
    "unit": (pico_mamba2, {}, [forget(2, REMOVED_A_LOG["unit"])]),
    "falcon": (pico_falcon_mamba, {}, []),
    "falcon, biases, thin": (pico_falcon_mamba, {"use_bias": True, "hidden_size": 40}, [thin, forget(3)]),
    "falcon, 5 states, rank 3": (pico_falcon_mamba, {"state_size": 5, "time_step_rank": 3}, []),
    "falcon, other epsilon": (pico_falcon_mamba, {"mixer_rms_eps": 1e-2}, []),
    "mamba, 20 channels for 32": (pico_mamba, {"intermediate_size": 20, "state_size": 3}, []),
    "mamba, 50 channels": (
        pico_mamba,
        {"intermediate_size": 50, "state_size": 12},
        [thin, forget(4)],
    ),
    "falcon, 24 channels": (pico_falcon_mamba, {"intermediate_size": 24, "state_size": 4}, []),
}
MAMBA2 = [name for name, (make, _, _) in CASES.items() if make is pico_mamba2]


def made(case: str) -> Any:
    maker, fields, changes = CASES[case]
    model = maker(**fields)
    with torch.no_grad():
        for change in changes:
            change(model)
    return model


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def stock(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def near(found: Tensor, expected: Tensor, bound: float = 1e-5) -> bool:
    if not expected.numel():
        return found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) < bound


def encoded(model: Any, **options: Any) -> NativeEngine:
    return NativeEngine(model.config, packed.of(held(model)).tensors, **options)


PACKED = {None: {}, "bf16": {"dtype": "bf16"}, "int8": {"dtype": "int8", "head": "int8"}}
SHELVED = (
    "odd sizes",
    "heads of 48 channels",
    "biases",
    "falcon, biases, thin",
    "mamba, 50 channels",
)
