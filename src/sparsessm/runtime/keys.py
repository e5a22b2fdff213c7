"""Keys and values: where they lie in a sequence's state, and how a state gets room for more of them.

Place in the flow: below the parts of a layer and the engines, which ask it for everything that grows. A state
is one row of floats: what mixers carry, which has one size; of a model with attention then the number of
tokens that were read, and blocks of `BLOCK` tokens, each with what all layers' attention keeps of them. So a
state grows by floats behind it, and is kept, copied and saved as before. Values are float32; another form of
them would be another size of `block`, and of what attention.py, latent.py and attention_impl.h write into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # tokens; KEPT in kernels/runtime.h
MOST = 1 << 24  # tokens that a float counts
SPARE = 8  # a state that has no room gets at least a part of so many more


@final
@dataclass(frozen=True)
class Keys:
    """How the states of a model lie.

    Attributes:
        fixed: floats before the blocks; the last is the number of tokens, where there are blocks.
        block: floats of a block; 0: nothing grows.
    """

    fixed: int
    block: int

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
        return Reading(blocks, start, length, cosines, sines)


@final
class Reading:
    """Keys and values of a sequence while a piece of its prompt is read.

    Attributes:
        blocks: (n, block) of the state, written in place.
        start, length: tokens before the piece, and of it.
        cosines, sines: (length, pairs) of the piece's positions; None where nothing is turned.
        mask: (length, start + length), True where a token sees another.
    """

    def __init__(
        self, blocks: Tensor, start: int, length: int, cosines: Tensor | None, sines: Tensor | None
    ) -> None:
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
            place: floats before the layer's in a block: keys (heads, width, BLOCK), then values alike.

        Returns:
            all so far, (heads, start + L, width) each.
        """
        return self.add(place, keys), self.add(place + keys[0].numel() * BLOCK, values)

    def add(self, place: int, entering: Tensor) -> Tensor:
        """Add what each token of the piece leaves, (L, heads, width).

        Args:
            place: floats before it in a block: (heads, width, BLOCK).

        Returns:
            all so far, (heads, start + L, width).
        """
        _, heads, width = entering.shape
        own = self.blocks[:, place : place + heads * width * BLOCK].unflatten(1, (heads, width, BLOCK))
        at = torch.arange(self.start, self.start + self.length)
        own[at // BLOCK, :, :, at % BLOCK] = entering
        return own.permute(1, 0, 3, 2).flatten(1, 2)[:, : self.start + self.length]
