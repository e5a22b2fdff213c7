"""tools/: the training forward is the stock model's, and held-out text stays out of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from pico import pico_mamba, pico_mamba2

from sparsessm.data.texts import stdlib_modules

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not TOOLS.is_dir():
        pytest.skip("no tools/ beside the tests (an installed package)")
    monkeypatch.syspath_prepend(str(TOOLS))
    import train_builtin

    return train_builtin


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_loss_and_gradients_are_those_of_the_stock_model(tools: ModuleType, kind: str) -> None:
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    make = {"mamba": pico_mamba, "mamba2": lambda: pico_mamba2(tie_word_embeddings=True)}[kind]
    loss = {"mamba": tools.fast_mamba, "mamba2": tools.fast_mamba2}[kind].loss
    stock, fast = make(), make()
    logits = stock(tokens[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    expected.backward()
    value = loss(fast, tokens)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    for (name, slow), quick in zip(stock.named_parameters(), fast.parameters(), strict=True):
        error = (quick.grad - slow.grad).norm() / slow.grad.norm()
        assert error < (0.03 if kind == "mamba" else 0.06), name  # bfloat16 products, of the scan too


def test_muon_steps_are_orthogonal(tools: ModuleType) -> None:
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.transpose(1, 2)):
        values = torch.linalg.svdvals(tools.orthogonal(matrix))
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
