"""Weight matrices as the runtime reads them, dense, without their zeros or as codes of few bits, and the
decoder made of them.

Part of the kernels' door: shapes are checked here and again natively. What a matrix computes is torch's
`linear` of the weight it stands for; the native side is matrix.h, few_bits.h, product_impl.h and step_impl.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.kernels.arguments import expect_dense, expect_floats

BLOCK = 64  # columns that share a scale where int8 weights meet inputs (matrix.h)
PIECE = 32  # columns that have one width, and a multiple of which may have a scale, in codes (few_bits.h)
MOST_COLUMNS = 65535  # of codes
MANY = (
    16  # rows of inputs from which a dense matrix of floats is better widened to float32 and left to the BLAS
)
TINY = 1e-30  # inputs below it are zero there (product_impl.h)
VALUES = (torch.float32, torch.bfloat16, torch.int8)


class Matrix:
    """A weight (rows, cols), immutable.

    Attributes:
        rows, cols: its shape.
        sparse: zeros are not stored.
        nbytes: bytes that one decoding step reads.
    """

    def __init__(
        self, native: Any, wide: Callable[[], Tensor] | None = None, *, rounds: bool = False
    ) -> None:
        """Wrap what the extension made.

        Args:
            wide: gives the weight as float32, for products of `MANY` rows or more by the BLAS, where that is
                faster; None: it never is.
            rounds: inputs are `rounded` here, as not all of the native ways do it.
        """
        self.native, self._wide, self._rounds = native, wide, rounds
        self.rows, self.cols = int(native.rows), int(native.cols)
        self.sparse, self.nbytes = bool(native.sparse), int(native.nbytes)

    @staticmethod
    def dense(values: Tensor, scale: Tensor | None = None) -> Matrix:
        """A matrix whose every entry is stored; everything is copied.

        Args:
            values: (rows, cols) float32, bfloat16 or int8, which is held as `codes`.
            scale: (rows,) float32, with int8: what a unit of a row is worth.

        Raises:
            ValueError: another dtype or shape.
        """
        _expect("values", values, VALUES, -1, -1)
        values = values.detach().contiguous()
        made = kernels.extension().dense(torch.get_num_threads(), _bits(values), _floats(scale))
        if values.dtype == torch.int8:
            return Matrix(made)
        held = made.values.view(values.dtype)
        return Matrix(made, held.float)

    @staticmethod
    def packed(
        mask: Tensor, cols: int, values: Tensor, scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Matrix:
        """A matrix of its kept entries (docs/sparse-format.md, kind "bitmask"); everything is copied.

        Args:
            mask: (stored rows, ceil(cols / 8)) uint8, bit j of a row keeps column j.
            values: (kept,) float32, bfloat16 or int8, row by row.
            scale: (stored rows,) float32, with int8.
            rows: which of the stored rows the matrix has, in this order, int64; all if not given.

        Raises:
            ValueError: mask and values that do not fit each other.
        """
        _expect("mask", mask, (torch.uint8,), -1, -1)
        _expect("values", values, VALUES, -1)
        if rows is not None:
            _expect("rows", rows, (torch.int64,), -1)
        order = None if rows is None else rows.contiguous()
        made = kernels.extension().sparse(
            mask.contiguous(), cols, _bits(values.contiguous()), _floats(scale), order
        )
        return Matrix(made, rounds=scale is not None)

    @staticmethod
    def codes(
        codes: Tensor,
        scale: Tensor,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        group: int = 0,
    ) -> Matrix:
        """Integers of few bits: sixteen rows of 32 columns have the width that takes the fewest bytes, and
        what is beyond it is stored apart (few_bits.h); everything is copied.

        Args:
            codes: (stored rows, cols up to `MOST_COLUMNS`) int16; where all are odd, a bit less is stored.
            scale: (stored rows,): what a unit of a row is worth; (stored rows, ceil(cols / group)) if there
                are groups. columns: (cols,): the same of a column.
            rows: as in `packed`.
            group: columns that share a scale, a multiple of 32; 0: all.

        Raises:
            ValueError: another dtype or shape, a row that is not there.
        """
        _expect("codes", codes, (torch.int16,), -1, -1)
        order = None
        if rows is not None:
            _expect("rows", rows, (torch.int64,), -1)
            order = rows.contiguous()
        expect_floats(scale=scale)
        _expect("scale", scale, (scale.dtype,), *([-1, -1] if group else [-1]))
        held = (scale if group else scale[:, None]).detach().float().contiguous()
        made = kernels.extension().codes(
            torch.get_num_threads(), codes.contiguous(), held, group, _floats(columns), order
        )
        return Matrix(made)

    def linear(self, x: Tensor, bias: Tensor | None = None, *, softplus: bool = False) -> Tensor:
        """x (L, cols) float32 -> x @ weight.T + bias, (L, rows) float32.

        With integers x is `rounded` first; with `codes` after it was multiplied by the factors of columns and
        put into the order in which those lie.

        Args:
            bias: (rows,) float32.
            softplus: give the softplus of it.

        Raises:
            ValueError: another dtype or shape.
        """
        _expect("x", x, (torch.float32,), -1, self.cols)
        if bias is not None:
            _expect("bias", bias, (torch.float32,), self.rows)
            bias = bias.detach().contiguous()
        x = x.detach()
        if self._rounds:
            x = rounded(x)
        if self._wide is not None and len(x) >= MANY:  # what a BLAS is made for
            out = F.linear(x, self._wide(), bias)
            return F.softplus(out) if softplus else out
        x = x if x.stride(-1) == 1 or self.cols == 1 else x.contiguous()
        out = kernels.empty(x.shape[0], self.rows)
        self.native.product(kernels.LEVEL, torch.get_num_threads(), x, bias, softplus, out)
        return out

    def row(self, index: int) -> Tensor:
        """Row `index` as float32 (cols,).

        Raises:
            ValueError: there is no such row.
        """
        out = kernels.empty(self.cols)
        self.native.row(index, out)
        return out


class Decoder:
    """A whole network, natively: `step` takes every sequence of a batch one token further in one call."""

    def __init__(
        self, sizes: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], rest: Mapping[str, Any]
    ) -> None:
        """Take matrices and vectors as native_network.cpp names them (runtime/part.py makes them).

        Raises:
            ValueError: one that is missing or does not fit the sizes.
        """
        made = kernels.extension().decoder(dict(sizes), [_native(part) for part in parts], _native(rest))
        self._native, self.vocabulary = made, int(sizes["vocabulary"])
        self.state_size, self.block = int(made.state_size), int(made.block)

    def step(self, tokens: Tensor, states: Tensor | list[Tensor], threads: int) -> Tensor:
        """Read one token of each sequence.

        Args:
            tokens: (B,) int64.
            states: of each sequence float32 (state_size,), with attention (state_size + n block,), advanced
                in place; a tensor where all have one length.

        Returns:
            logits (B, V).

        Raises:
            ValueError: shapes that do not fit, a token outside the vocabulary, a state without room for the
                token's keys and values.
        """
        _expect("tokens", tokens, (torch.int64,), -1)
        if isinstance(states, list):
            for state in states:
                _expect("state", state, (torch.float32,), -1)
        else:
            _expect("state", states, (torch.float32,), len(tokens), -1)
            if not states.is_contiguous():
                raise ValueError("state is not contiguous, and it is advanced in place")
            states = list(states.unbind())
        logits = kernels.empty(len(tokens), self.vocabulary)
        self._native.step(kernels.LEVEL, threads, tokens.contiguous(), states, logits)
        return logits


def _native(fields: Any) -> Any:
    """Fields with the extension's matrices in place of ours, however deep they lie."""
    if isinstance(fields, Matrix):
        return fields.native
    if isinstance(fields, Mapping):
        return {name: _native(part) for name, part in fields.items()}
    if isinstance(fields, list):
        return [_native(part) for part in fields]
    return fields


def rounded(x: Tensor) -> Tensor:
    """x (L, cols) to 8 bits for each 64 columns, as the decoder rounds what meets int8 weights.

    The largest magnitude of a block becomes 127. Prompts and decoding round alike, so that a text gives the
    same state either way.
    """
    blocks = F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most = blocks.abs().amax(2, keepdim=True)
    inverse = torch.full_like(most, 127.0) / most  # torch rounds twice in 127.0 / most, the kernels once
    inverse = torch.where(most > TINY, inverse, 0.0)
    return torch.round(blocks * inverse).mul_(most / 127.0).flatten(1)[:, : x.shape[1]]


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def _floats(scale: Tensor | None) -> Tensor | None:
    if scale is None:
        return None
    expect_floats(scale=scale)
    _expect("scale", scale, (scale.dtype,), -1)
    return scale.detach().float().contiguous()


def _expect(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *shape: int) -> None:
    """Refuse another dtype, shape, layout or device; -1 is any length."""
    expect_dense(name, tensor)
    found, device = tuple(tensor.shape), tensor.device.type
    if (
        tensor.dtype not in dtypes
        or len(found) != len(shape)
        or any(want not in (-1, have) for want, have in zip(shape, found, strict=True))
    ):
        allowed = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tensor.dtype} {found}, expected {allowed} {shape}")
    if device != "cpu":
        raise ValueError(f"{name} is on the device {device}; the runtime's matrices are on the CPU")
