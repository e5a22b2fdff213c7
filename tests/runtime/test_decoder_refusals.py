"""The native decoder refuses parts of a network that do not fit each other, whoever hands them over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import native, needs_native
from pico_hybrids import NEW, pico_hybrid

from sparsessm.kernels.matrix import Decoder
from sparsessm.runtime import engine as native_engine

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")


@needs_native
@pytest.mark.parametrize(
    ("name", "kind", "change", "words"),
    [
        ("bamba", "attention", {"heads": 3}, "heads must be a multiple of shared"),
        ("bamba", "attention", {"head_width": 5}, r"q is \(16, 16\), expected \(20, 16\)"),
        ("bamba", "attention", {"shared": 0}, "shared is out of range"),
        ("bamba", "attention", {"o": None}, "o is missing"),
        ("bamba", "attention", {"norm": torch.ones(17)}, "norm has 17 values, expected 16"),
        ("bamba", "attention", {"reads": "side"}, "a part reads what is beside the stream, and nothing is"),
        ("bamba", "attention", {"reads": "both", "norm": torch.ones(32)}, r"q is \(16, 16\), expected"),
        ("bamba", "attention", {"reads": "all"}, "reads is 'all'; allowed: before, stream, both, side, sum"),
        ("bamba", "attention", {"kind": "gate"}, "kind is 'gate'; allowed: mamba, delta, attention, latent"),
        ("bamba", "mlp", {"curve": "tanh"}, "curve is 'tanh'; allowed: silu, gelu, relu2"),
        ("bamba", "mlp", {"gate": "down"}, r"gate is \(16, 24\), expected \(24, 16\)"),
        ("bamba", "mamba", {"reads": "before"}, "the first part reads what a part before it read"),
        ("bamba", "mamba", {"reads": "both", "norm": torch.ones(32)}, "a mixer reads the stream alone"),
        ("granitemoehybrid", "experts", {"chosen": 5}, "chosen is 5 of 4 experts"),
        ("granitemoehybrid", "experts", {"choice": "first"}, "choice is 'first'; allowed: softmax,"),
        ("granitemoehybrid", "experts", {"each": []}, "there are no experts"),
        ("nemotron_h-latent", "experts", {"before": None}, "before and behind come together"),
        ("nemotron_h-latent", "experts", {"groups": 3}, "groups do not fit the experts"),
        ("nemotron_h-latent", "experts", {"favour": torch.ones(3)}, "favour has 3 values, expected 4"),
        ("nemotron_h", "experts", {"reads": "both", "norm": torch.ones(32)}, "router is"),
        ("zamba2", "linear", {"linear": None}, "linear is missing"),
        ("qwen3_5_text", "delta", {"groups": 3}, "heads must be a multiple of groups"),
        ("qwen3_5_text", "delta", {"keys": 7}, "mixed has 52 rows, expected 48"),
        ("qwen3_5_text", "delta", {"mixed": []}, "mixed has 0 rows, expected 52"),
        ("qwen3_5_text", "delta", {"keeps": torch.ones(3, dtype=torch.uint8)}, "one entry a head"),
        ("qwen3_5_text", "delta", {"A": torch.ones(3)}, "A has 3 values, expected 4"),
        ("qwen3_5_text", "attention", {"k_norm": torch.ones(7)}, "k_norm has 7 values, expected 8"),
        ("qwen3_5_text", "attention", {"heads": 2}, "q is"),
        ("kimi_linear", "delta", {"gate_narrow": None}, r"gate is \(16, 8\), expected \(16, 16\)"),
        ("kimi_linear", "delta", {"step_narrow": "beta"}, r"step is \(16, 8\), expected \(16, 2\)"),
        ("kimi_linear", "delta", {"step_narrow": "step"}, "step_narrow does not read the stream"),
        ("kimi_linear", "delta", {"by_channel": False}, r"step is \(16, 8\), expected \(2, 8\)"),
        ("kimi_linear", "delta", {"dt_bias": torch.ones(2)}, "dt_bias has 2 values, expected 16"),
        ("kimi_linear", "latent", {"heads": 3}, r"o is \(16, 20\), expected \(16, 15\)"),
        ("kimi_linear", "latent", {"rank": 11}, r"row is \(14, 16\), expected \(13, 16\)"),
        ("kimi_linear", "latent", {"common": 0}, "common is out of range"),
        ("kimi_linear", "latent", {"row_norm": torch.ones(14)}, "row_norm has 14 values, expected 12"),
        ("kimi_linear", "latent", {"keys": None}, "keys is missing"),
        ("kimi_linear", "latent", {"keys": []}, "keys does not have one matrix a head"),
        ("kimi_linear", "latent", {"values": "keys"}, "a matrix of values does not fit a head"),
        ("kimi_linear-latent", "latent", {"q_norm": torch.ones(7)}, "q_norm has 7 values, expected 8"),
        ("kimi_linear-latent", "latent", {"narrow": None}, r"q is \(32, 8\), expected \(32, 16\)"),
        ("olmo_hybrid", "mlp", {"after": torch.ones(3)}, "after has 3 values, expected 16"),
        ("olmo_hybrid", "attention", {"beside": True}, "what goes beside the stream has no norm"),
    ],
)
def test_the_decoder_refuses_parts_that_do_not_fit(
    name: str, kind: str, change: dict[str, Any], words: str
) -> None:
    engine: Any = native(pico_hybrid(name))
    sizes = {"width": 16, "vocabulary": 64, "epsilon": 1e-5} | native_engine._sizes(engine._plan)
    rest: dict[str, Any] = {"norm": engine._norm, "embedding": engine._embedding, "head": engine._head}
    rest["turns"] = engine._plan.angles
    parts = [part.native() for part in engine._parts]
    assert Decoder(sizes, parts, rest).state_size == engine.state_size
    at = next(i for i, part in enumerate(parts) if part.get("kind", "mamba") == kind)
    others = ("down", "beta", "step", "keys")  # what another has
    parts[at] |= {key: parts[at][new] if new in others else new for key, new in change.items()}
    with pytest.raises(ValueError, match=words):
        Decoder(sizes, parts, rest)


@needs_native
def test_more_turned_channels_than_a_head_has_and_one_state_twice_are_refused() -> None:
    engine: Any = native(pico_hybrid("bamba"))
    sizes = {"width": 16, "vocabulary": 64, "epsilon": 1e-5} | native_engine._sizes(engine._plan)
    rest = {
        "norm": engine._norm,
        "embedding": engine._embedding,
        "head": engine._head,
        "turns": torch.ones(3),
    }
    with pytest.raises(ValueError, match="turns are more than half of a head"):
        Decoder(sizes, [part.native() for part in engine._parts], rest)
    state = engine.keys.room(engine.new_state(1), 1)[0]
    with pytest.raises(ValueError, match="a state is there twice"):
        engine.step(torch.tensor([1, 2]), [state, state])
