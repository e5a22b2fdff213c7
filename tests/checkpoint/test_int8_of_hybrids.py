"""Which matrices of a hybrid `pack --dtype int8` takes: all but those that are small and decide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packable import stock
from pico_hybrids import FAMILIES, VARIANTS, pico_hybrid

from sparsessm import checkpoint

KEPT = (  # step sizes and decays, gates of them, routers
    *("dt_proj.weight", "in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight", "a_proj.weight"),
    *("b_proj.weight", "f_a_proj.weight", "f_b_proj.weight", "gate.weight", "router.weight"),
    *("shared_expert_gate.weight", "A_log"),
)
ENDS = ("embed_tokens.weight", "embeddings.weight", "lm_head.weight")


@pytest.mark.parametrize("head", [None, "int8"])
@pytest.mark.parametrize("name", [*FAMILIES, "nemotron_h-latent", "zamba2-two-blocks", "kimi_linear-latent"])
def test_every_matrix_but_those_that_decide(name: str, head: str | None, tmp_path: Path) -> None:
    assert name in FAMILIES or name in VARIANTS
    model = pico_hybrid(name)
    stock(tmp_path / "in", model)
    read = checkpoint.pack(tmp_path / "in", tmp_path / "out", dtype="int8", head=head)
    for found, tensor in read.tensors.items():
        expert = ".experts." in found
        matrix = expert or len(tensor.shape) == 2
        ends = found.endswith(ENDS)
        wanted = (
            matrix and not found.endswith(tuple(f".{one}" for one in KEPT)) and (not ends or head == "int8")
        )
        dtypes = {array.dtype for part, array in tensor.parts.items() if part.endswith(".values")}
        assert (dtypes == {torch.int8}) == wanted, found
