"""tools/: the training forward is the stock model's, and held-out text stays out of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pico import pico_mamba, pico_mamba2
from pico_hybrids import NEW, pico_hybrid

from sparsessm.data.texts import stdlib_modules

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not TOOLS.is_dir():
        pytest.skip("no tools/ beside the tests (an installed package)")
    monkeypatch.syspath_prepend(str(TOOLS))
    import train_builtin

    return train_builtin


MODELS: dict[str, Callable[[], Any]] = {
    "mamba": pico_mamba,
    "mamba2": lambda: pico_mamba2(tie_word_embeddings=True),
    "qwen3_5_text": lambda: pico_hybrid("qwen3_5-tied", attention_bias=False),
    "granitemoehybrid": lambda: pico_hybrid("granitemoehybrid", tie_word_embeddings=True, **PLAIN),
}
# The multipliers that the trained model has none of.
PLAIN = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_stock_model(
    tools: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    if kind not in ("mamba", "mamba2") and not NEW:
        pytest.skip("hybrids need transformers 5")
    if kind not in ("mamba", "mamba2"):  # whose small random models make much of rounded products
        monkeypatch.setattr(tools.fast_mamba, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(tools.fast_granite, "BALANCE", 0.0)  # stock code has another term for experts
    loss, make = tools.FAST[kind].loss, MODELS[kind]
    stock, fast = make(), make()
    logits = stock(tokens[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    expected.backward()
    value = loss(fast, tokens)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    for (name, slow), quick in zip(stock.named_parameters(), fast.parameters(), strict=True):
        error = (quick.grad - slow.grad).norm() / slow.grad.norm()
        # bfloat16 products, of Mamba-2's scan too; in hybrids those of the head (and of that scan) alone
        assert error < {"mamba": 0.03, "qwen3_5_text": 0.03}.get(kind, 0.06), name


def test_muon_steps_are_orthogonal(tools: ModuleType) -> None:
    muon = sys.modules[tools.Muon.__module__]
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.transpose(1, 2)):
        values = torch.linalg.svdvals(muon.orthogonal(matrix))
        assert values.min() > 0.5 and values.max() < 1.3


def test_an_epoch_has_every_window_once(tools: ModuleType) -> None:
    length = tools.LENGTH + 1
    stream = tools.Stream(torch.arange(9 * length), seed=5)
    windows = [stream.window(i) for i in range(2 * stream.cells)]
    first, second = windows[: stream.cells], windows[stream.cells :]
    for epoch in (first, second):
        assert torch.cat(epoch).unique().numel() == stream.cells * length
    assert not torch.equal(torch.stack(first), torch.stack(second))
    assert torch.equal(tools.Stream(torch.arange(9 * length), seed=5).window(3), windows[3])


def test_training_tokens_are_the_training_side(tools: ModuleType, tmp_path: Path) -> None:
    def code(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    tokens = tools.token_array(code, tmp_path / "cache.pt", tests=False)
    texts = sorted(bytes(part.tolist()).decode() for part in _split(tokens))
    assert texts == sorted(text for _, text in stdlib_modules(held_out=False))


def _split(tokens: torch.Tensor) -> list[torch.Tensor]:
    """The pieces after each 0 (the end-of-text id, and no byte of a source file)."""
    marks = (tokens == 0).nonzero().flatten().tolist() + [len(tokens)]
    return [tokens[a + 1 : b] for a, b in zip(marks, marks[1:], strict=False)]
