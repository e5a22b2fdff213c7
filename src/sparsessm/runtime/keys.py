"""Keys and values: where they lie in a sequence's state, and how a state gets room for more of them.

Place in the flow: below the parts of a layer and the engines, which ask it for everything that grows. A state
is one row of floats: what mixers carry, which has one size; of a model with attention then the number of
tokens that were read, and blocks of `BLOCK` tokens, each with what all layers' attention keeps of them. So a
state grows by floats behind it, and is kept, copied and saved as before.

What a token leaves may be held as bytes, four in a float of the state, with a scale for each head and token
(kernels/runtime.h says how; attention_impl.h reads it while decoding). That is not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # tokens; KEPT in kernels/runtime.h
MOST = 1 << 24  # tokens that a float counts
FORMS = ("float32", "int8")
SPARE = 8  # a state that has no room gets at least a part of so many more


_WORDS = BLOCK // 4
_NO_EXPONENT = 0x7F000000  # by which no four bytes become an infinity or NaN; as in kernels/runtime.h
_TINY = 1e-30  # what is no larger is zero, as in kernels/matrix.py


def checked_form(form: Any) -> str:
    """How keys and values are held.

    Raises:
        ValueError: not as one of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"keys is {form!r}; allowed: {', '.join(FORMS)}")
    return form


def floats_of(width: int, int8: bool) -> int:
    """Of a block, for (width,) numbers of each token."""
    return width * _WORDS + BLOCK if int8 else width * BLOCK


def coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers as bytes.

    Args:
        x: (..., width) float32.

    Returns:
        int8 (..., width), -127 to 127, and what 1 is worth, float32 (...,). A row that holds NaN or Inf is
        worth NaN.
    """
    most = x.abs().amax(-1)
    inverse = torch.where(most > _TINY, torch.full_like(most, 127.0) / most, 0.0)
    sane = torch.isfinite(x).all(-1)
    codes = torch.round(x * inverse[..., None]).nan_to_num(0.0, 0.0, 0.0).to(torch.int8)
    return codes * sane[..., None], torch.where(sane, most / 127.0, torch.nan)


def _packed(codes: Tensor) -> Tensor:
    """int8 (..., BLOCK) -> float32 (..., BLOCK / 4)."""
    words = codes.unflatten(-1, (4, _WORDS)).transpose(-1, -2).contiguous().view(torch.int32)[..., 0]
    words = words ^ _NO_EXPONENT
    return ((words >> 1 & 0x7FFFFFFF) | words << 31).view(torch.float32)


def _unpacked(words: Tensor) -> Tensor:
    """The other way."""
    whole = words.contiguous().view(torch.int32)
    whole = (whole << 1 | (whole >> 31 & 1)) ^ _NO_EXPONENT
    return whole[..., None].view(torch.int8).transpose(-1, -2).flatten(-2)


@final
@dataclass(frozen=True)
class Keys:
    """How the states of a model lie.

    Attributes:
        fixed: floats before the blocks; the last is the number of tokens, where there are blocks.
        block: floats of a block; 0: nothing grows.
        int8: what tokens leave is held as bytes.
    """

    fixed: int
    block: int
    int8: bool = False

    def tokens(self, state: Tensor) -> int:
        """How many tokens' keys and values are in a state (n,); 0 where nothing grows."""
        return int(state[self.fixed - 1]) if self.block else 0

    def size(self, tokens: int) -> int:
        """Floats of a state with room for so many tokens."""
        return self.fixed + -(-tokens // BLOCK) * self.block

    def room(self, states: Tensor, tokens: int) -> Tensor:
        """States with room for so many tokens more.

        Args:
            states: (..., n).

        Returns:
            `states` where there is room, else a larger copy.

        Raises:
            ValueError: more tokens than a state can count.
        """
        if not self.block:
            return states
        most = int(states[..., self.fixed - 1].max()) + tokens if states.numel() else tokens
        if most >= MOST:
            raise ValueError(f"a text of {most} tokens; allowed: fewer than {MOST}")
        has, needs = states.shape[-1], self.size(most)
        if needs <= has:
            return states
        spare = (has - self.fixed) // self.block // SPARE * self.block
        return F.pad(states, (0, max(needs, has + spare) - has))

    def refuse_full(self, state: Tensor, tokens: int) -> None:
        """Check that a state (n,) has room.

        Raises:
            ValueError: there is none for so many tokens more.
        """
        if self.block and len(state) < self.size(self.tokens(state) + tokens):
            raise ValueError(f"a state has no room for the keys and values of {tokens} tokens more")

    def trimmed(self, state: Tensor) -> Tensor:
        """A state (n,) without the room that it does not use: itself, or a copy."""
        size = self.size(self.tokens(state))
        return state if size == len(state) else state[:size].clone()

    def misfit(self, state: Tensor) -> str:
        """What is wrong with a state (n,) of finite numbers; empty if nothing is."""
        if not self.block:
            wrong = len(state) != self.fixed
            return f"it has {len(state)} values, this model {self.fixed}" if wrong else ""
        if len(state) < self.fixed:
            return f"it has {len(state)} values, this model at least {self.fixed}"
        count = float(state[self.fixed - 1])
        if not (0 <= count < MOST and count == int(count)):
            return f"it says that {count:g} tokens were read; allowed: whole numbers from 0 to {MOST - 1}"
        if (len(state) - self.fixed) % self.block or len(state) < self.size(int(count)):
            return f"it has {len(state)} values, this model {self.size(int(count))} after {int(count)} tokens"
        return ""

    def reading(self, state: Tensor, length: int, angles: Tensor | None, factor: float) -> Reading | None:
        """What a prompt needs of a state; None where nothing grows.

        Args:
            state: (n,), with room. length: tokens of the prompt.
            angles: (pairs,) radians a token, by which pairs of channels are turned. factor: of turned ones.

        Raises:
            ValueError: there is no room for them.
        """
        if not self.block:
            return None
        start = self.tokens(state)
        self.refuse_full(state, length)
        blocks = state[self.fixed :].view(-1, self.block)
        cosines = sines = None
        if angles is not None:
            turned = torch.arange(start, start + length).float()[:, None] * angles
            cosines, sines = turned.cos() * factor, turned.sin() * factor
        return Reading(blocks, start, length, cosines, sines, self.int8)


@final
class Reading:
    """Keys and values of a sequence while a piece of its prompt is read.

    Attributes:
        blocks: (n, block) of the state, written in place.
        start, length: tokens before the piece, and of it.
        cosines, sines: (length, pairs) of the piece's positions; None where nothing is turned.
        mask: (length, start + length), True where a token sees another.
        int8: as of `Keys`.
    """

    def __init__(
        self,
        blocks: Tensor,
        start: int,
        length: int,
        cosines: Tensor | None,
        sines: Tensor | None,
        int8: bool = False,
    ) -> None:
        self.int8 = int8
        self.blocks, self.start, self.length = blocks, start, length
        self.cosines, self.sines = cosines, sines
        self.mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)

    def turned(self, x: Tensor) -> Tensor:
        """(L, heads, width), channels c and c + pairs of each head turned by the position."""
        assert self.cosines is not None and self.sines is not None, "a model that turns nothing"
        pairs = self.cosines.shape[-1]
        first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        cosines, sines = self.cosines[:, None], self.sines[:, None]
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1)

    def keep(self, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the piece, (L, heads, width) each, to a layer's.

        Args:
            place: floats before the layer's in a block: keys, then values.

        Returns:
            all so far, (heads, start + L, width) each, as they are held.
        """
        _, heads, width = keys.shape
        return self.add(place, keys), self.add(place + heads * floats_of(width, self.int8), values)

    def add(self, place: int, entering: Tensor) -> Tensor:
        """Add what each token of the piece leaves, (L, heads, width).

        Args:
            place: floats before it in a block: for each head (width, BLOCK) numbers; or as many bytes and
                the scales (BLOCK,).

        Returns:
            all so far, (heads, start + L, width), as they are held.
        """
        _, heads, width = entering.shape
        each, count = floats_of(width, self.int8), self.start + self.length
        own = self.blocks[:, place : place + heads * each].unflatten(1, (heads, each))
        at = torch.arange(self.start, count)
        if self.int8:
            known = self._code(own, entering, at, width)
        else:
            known = own.unflatten(2, (width, BLOCK))
            known[at // BLOCK, :, :, at % BLOCK] = entering
        return known.permute(1, 0, 3, 2).flatten(1, 2)[:, :count]

    def _code(self, own: Tensor, entering: Tensor, at: Tensor, width: int) -> Tensor:
        """`entering` to places `at` in blocks `own` (n, heads, floats) -> all, (n, heads, width, BLOCK)."""
        words, scales = own[..., : width * _WORDS].unflatten(2, (width, _WORDS)), own[..., width * _WORDS :]
        codes, worth = coded(entering)
        touched = slice(int(at[0]) // BLOCK, int(at[-1]) // BLOCK + 1)
        some = _unpacked(words[touched])
        some[at // BLOCK - touched.start, :, :, at % BLOCK] = codes
        words[touched] = _packed(some)
        scales[at // BLOCK, :, at % BLOCK] = worth
        return _unpacked(words).float() * scales[:, :, None]
