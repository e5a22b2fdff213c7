"""Products in float32 are torch's, bit for bit; in bfloat16 they are those of the rounded numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.kernels import products

# rows, inputs, outputs: below, at and beyond the edges of tiles (16, 32) and of what is held at once (1,024).
SHAPES = [(1, 1, 1), (3, 5, 7), (33, 31, 33), (64, 64, 64), (130, 48, 100), (257, 100, 65), (5, 600, 17)]
SHAPES += [(1025, 3, 16), (2049, 40, 33), (40, 1100, 5), (7, 33, 300), (35, 4200, 40)]


@pytest.fixture(params=[*products.units(), "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All that can multiply here, one after the other, and products are rounded."""
    names = () if request.param == "torch" else (request.param,)
    monkeypatch.setattr(products, "units", lambda: names)
    with products.computing("bfloat16"):
        yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, y: Tensor) -> Tensor:
    """x y' of the rounded numbers, in float64."""
    return products.rounded(x).double() @ products.rounded(y).double().mT


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want).abs().max() <= 3e-6 * want.abs().max())


@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
def test_a_rounded_linear_layer_is_that_of_the_rounded_numbers(
    by: str, rows: int, inputs: int, outputs: int
) -> None:
    x, weight, bias = normal(rows, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    assert near(products.linear(x, weight), exact(x, weight))
    assert near(products.linear(x, weight.T.contiguous().T), exact(x, weight))
    assert near(products.linear(x, weight, bias), exact(x, weight) + bias.double())


@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
def test_rounded_moments_are_those_of_the_rounded_numbers(
    by: str, rows: int, inputs: int, outputs: int
) -> None:
    x, y = normal(rows, inputs), normal(rows, outputs, seed=1)
    gram, cross = products.Sum(), products.Sum()
    for _ in range(2):
        gram.add(x.T, x.T)
    cross.add(x.T, y.T)
    total, other = gram.take(), cross.take()
    assert total is not None and other is not None
    assert near(total, 2 * exact(x.T, x.T)) and (by == "torch" or torch.equal(total, total.T))
    assert near(other, exact(x.T, y.T)) and gram.take() is cross.take() is None


def test_views_and_dimensions_in_front_are_multiplied_as_they_lie(by: str) -> None:
    wide, weight = normal(4, 9, 70), normal(80, 90, seed=1)
    x, part = wide[:, 2:7, 5:45], weight[:33, 7:47]
    y = products.linear(x, part)
    assert y.shape == (4, 5, 33) and near(y, exact(x.reshape(20, 40), part).view(4, 5, 33))
    assert near(
        products.linear(x, normal(40, 33).T), exact(x.reshape(20, 40), normal(40, 33).T).view(4, 5, 33)
    )
    total = products.Sum()
    total.add(wide[0, :, ::2].T, wide[0, :, ::2].T)
    assert near(total.take(), exact(wide[0, :, ::2].T, wide[0, :, ::2].T))  # type: ignore[arg-type]


def test_nothing_is_nothing(by: str) -> None:
    assert products.linear(torch.zeros(0, 5), normal(3, 5)).shape == (0, 3)
    assert products.linear(torch.zeros(2, 0, 5), normal(3, 5)).shape == (2, 0, 3)
    total = products.Sum()
    total.add(torch.zeros(5, 0), torch.zeros(5, 0))
    assert torch.equal(total.take(), torch.zeros(5, 5, dtype=torch.float64))  # type: ignore[arg-type]


def test_large_small_and_infinite_numbers_come_through(by: str) -> None:
    x = torch.tensor([[1e30, 1.0], [1e-30, 1.0], [-1e30, 3e-3]])
    y = products.linear(x, torch.tensor([[1e8, 0.0], [0.0, 1.0]]))
    assert near(y[[0, 2]], exact(x, torch.tensor([[1e8, 0.0], [0.0, 1.0]]))[[0, 2]])
    assert y[1, 0] == pytest.approx(1e-22, rel=0.01) and y[1, 1] == 1
    for hostile in (torch.inf, -torch.inf, torch.nan):
        x = normal(40, 40)
        x[33, 17] = hostile
        y = products.linear(x, normal(20, 40))
        assert (
            not torch.isfinite(y[33]).any() and torch.isfinite(y[:33]).all() and torch.isfinite(y[34:]).all()
        )
        total = products.Sum()
        total.add(x.T, x.T)
        bad = ~torch.isfinite(total.take())  # type: ignore[arg-type]
        assert bad[17].all() and bad[:, 17].all() and bad.sum() == 79


def test_weights_are_laid_out_once_and_forgotten(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[Tensor] = []
    whole = products._packed
    monkeypatch.setattr(products, "_packed", lambda weight: laid.append(weight) or whole(weight))
    x, weight = normal(5, 40), normal(30, 40)
    for _ in range(3):
        products.linear(x, weight)
        products.linear(x, weight[:7])
    assert len(laid) == (0 if by == "torch" else 2)
    with products.computing("bfloat16"):  # a later pass: the weights may have changed
        weight.mul_(2)
        assert near(products.linear(x, weight), exact(x, weight))


def test_bits_depend_on_no_number_of_threads(by: str) -> None:
    if by == "torch":
        pytest.skip("a BLAS cuts its sums by threads")
    x, weight = normal(700, 200), normal(300, 200, seed=1)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with products.computing("bfloat16"):
            total = products.Sum()
            total.add(x.T, x.T)
            found.append((products.linear(x, weight), total.take()))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))  # type: ignore


def test_the_gradient_of_the_input_is_a_rounded_product_too(by: str) -> None:
    x, weight, dy = normal(2, 9, 40).requires_grad_(), normal(33, 40, seed=1), normal(2, 9, 33, seed=2)
    with torch.enable_grad():
        y = products.linear(x, weight, normal(33))
    (grad,) = torch.autograd.grad(y, x, dy)
    assert near(grad, exact(dy.view(18, 33), weight.T).view(2, 9, 40))


def test_rounded_products_refuse_gradients_of_weights_and_shapes_that_do_not_fit(by: str) -> None:
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        products.linear(normal(2, 3), normal(4, 3).requires_grad_())
    if by != "torch":
        with pytest.raises(ValueError, match="x has 30 columns, weight 31"):
            products.linear(normal(2, 30), normal(4, 31))
        with pytest.raises(ValueError, match="bias: dimension 0 is 5, expected 4"):
            products.linear(normal(2, 3), normal(4, 3), normal(5))
        with pytest.raises(ValueError, match="right: dimension 0 is 6, expected 5"):
            products.Sum().add(normal(3, 5), normal(3, 6))
        with pytest.raises(ValueError, match="no bfloat16 products by 'sse'"):
            packed = products._packed(normal(4, 3))
            kernels.extension().rounded_linear("sse", 1, normal(2, 3), packed, None, torch.empty(2, 4))


def test_float64_is_never_rounded(by: str) -> None:
    x, weight = normal(5, 40).double(), normal(30, 40).double()
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    total = products.Sum()
    total.add(x.T, x.T)
    assert torch.equal(total.take(), x.T @ x)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [False, True])
def test_float32_is_torchs_own_product_bit_for_bit(said: bool) -> None:
    x, weight, bias = normal(3, 70, 50), normal(90, 50), normal(90)
    rows = x.flatten(0, 1).movedim(0, -1)

    def check() -> None:
        assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
        total = products.Sum()
        for _ in range(2):
            total.add(rows, rows)
        assert torch.equal(total.take(), (rows @ rows.mT).double().add_(rows @ rows.mT))  # type: ignore

    if said:
        with products.computing("float32"):
            check()
    else:
        check()


def test_a_depthwise_layers_moments_are_float32_in_any_precision() -> None:
    rows = normal(6, 4, 50)
    with products.computing("bfloat16"):
        total = products.Sum()
        total.add(rows, rows)
    assert torch.equal(total.take(), (rows @ rows.mT).double())  # type: ignore[arg-type]


def test_the_precision_ends_with_its_block_whatever_happens_and_stays_in_its_thread() -> None:
    seen = []
    with products.computing("bfloat16"):
        other = threading.Thread(target=lambda: seen.append(products.rounds()))
        other.start()
        other.join()
        with products.computing("float32"):
            assert not products.rounds()
        assert products.rounds()
    assert seen == [False] and not products.rounds()
    with pytest.raises(KeyError), products.computing("bfloat16"):
        raise KeyError
    assert not products.rounds()


def test_auto_takes_bfloat16_where_there_are_tiles_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, used in (((), "float32"), (("avx512bf16",), "float32"), (("avx512bf16", "amx"), "bfloat16")):
        monkeypatch.setattr(products, "units", lambda names=names: names)
        choice = products.choose("auto")
        assert choice.used == used and "AMX" in choice.why
        assert choice.record()["by"] == ("amx" if used == "bfloat16" else "torch")
        for asked in ("float32", "bfloat16"):
            assert products.choose(asked).used == asked
    monkeypatch.setattr(products, "units", lambda: ())
    assert products.choose("bfloat16").record()["by"] == "rounded, then torch"
    with pytest.raises(ValueError, match="compute is 'int8'; allowed: float32, bfloat16, auto"):
        products.choose("int8")


@pytest.mark.parametrize("level", ["reference", "portable"])
def test_a_lower_level_of_the_kernels_has_no_units(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEVEL", level)
    assert products.units() == () and products.unit() == ""
