"""What an error in a row of the head costs, against autograd and softmax on the stock model in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_mamba
from pico_hybrids import FAMILIES, pico_hybrid
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import adapt
from sparsessm.calibration.prices import ALSO, row_prices
from sparsessm.calibration.vocabulary import RARE

TOKENS = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(0))  # 40 to 63 are never said


def stock(model: Any) -> dict[str, Tensor]:
    """By transformers' own forward: the means that the module's docstring names."""
    embedding, inputs, rows = model.get_input_embeddings(), [], []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())),
        embedding.register_forward_hook(lambda _, __, output: rows.append(output)),
    ]
    embedding.weight.requires_grad_(True)
    with torch.enable_grad():
        logits = model(TOKENS, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
        (grad,) = torch.autograd.grad(loss, rows)
    for hook in hooks:
        hook.remove()
    many, likely = TOKENS.numel(), logits[:, :-1].detach().double().softmax(-1).flatten(0, 1)
    flat = grad.flatten(0, 1).double()
    return {
        "fisher": (likely * (1 - likely)).sum(0) / many,
        "often": (TOKENS.flatten()[:, None] == torch.arange(logits.shape[-1])).sum(0) / (2 * many)
        + likely.sum(0) / (2 * many),
        "power": inputs[0].double().square().sum() / many,
        "gram": flat.T @ flat / many,
    }


def raised(rows: Tensor) -> Tensor:
    return rows + RARE * rows.mean()


TABLE = "backbone.embeddings.weight"


def test_a_head_and_an_embedding_apart() -> None:
    model = pico_mamba(tie_word_embeddings=False).double()
    got, means = row_prices(adapt(model), TOKENS, head=True), stock(model)
    assert torch.allclose(got["lm_head.weight"], raised(means["fisher"]), rtol=1e-5)
    assert torch.allclose(got[TABLE], raised(means["often"]), rtol=1e-5)
    largest = float(means["gram"].abs().max())
    assert torch.allclose(got[ALSO + TABLE], means["gram"], rtol=1e-5, atol=1e-6 * largest)
    assert (got["lm_head.weight"] > 0).all(), "tokens that the text never says cost something"


def test_a_head_that_is_the_embedding() -> None:
    model = pico_mamba().double()
    got = row_prices(adapt(model), TOKENS, head=True)
    means = stock(model)
    also = means["gram"] * means["often"].sum() / means["fisher"].sum()
    cost = means["fisher"] * means["power"] + means["often"] * means["gram"].trace()
    want = raised(cost / (means["power"] + also.trace()))
    assert torch.allclose(got[ALSO + TABLE], also, rtol=1e-5, atol=1e-6 * float(also.max()))
    assert torch.allclose(got[TABLE], want, rtol=1e-5)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_factors_on_the_way_in_and_out_count(kind: str) -> None:
    """Some hybrids multiply embeddings and logits by numbers, and one gives the embedding to every layer."""
    model = pico_hybrid(kind).eval()
    architecture = adapt(model)
    means, got = stock(model), row_prices(architecture, TOKENS, head=True)
    scale = architecture.logit_scale**2
    if architecture.tied:
        also = means["gram"] * means["often"].sum() / (scale * means["fisher"]).sum()
        table = architecture.tail.targets[0].name
        assert torch.allclose(got[ALSO + table], also, rtol=1e-2, atol=1e-3 * float(also.abs().max()))
    else:
        want = raised(scale * means["fisher"])
        assert torch.allclose(got["lm_head.weight"], want, rtol=1e-3)
        gram = got[ALSO + architecture.tail.targets[1].name]
        assert torch.allclose(gram, means["gram"], rtol=1e-2, atol=1e-3 * float(gram.abs().max()))
    with torch.no_grad():
        hidden = architecture.embed(TOKENS[:, :3])
        before = architecture.head(hidden)
        model.lm_head.weight.mul_(2)
        assert torch.allclose(architecture.head(hidden), 2 * before, rtol=1e-5)
        raw = model.lm_head(architecture._normed(hidden))
        assert torch.allclose(architecture.head(hidden), architecture.logit_scale * raw, rtol=1e-5)
