"""Tokens to text, piece by piece: never half a character, never part of a stop string that is cut off later.

Place in the flow: `generation.py` feeds it every token as it is chosen. The pieces, joined, are exactly the
text of all tokens decoded at once, up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not all of one yet
_WINDOW, _CONTEXT = 32, 16  # tokens decoded again with each new one: at most, and at least


class Pieces:
    """Decode tokens as they come; what a later token could still change is held back."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last tokens
        self._whole = ""  # their text
        self._given = 0  # characters of it that have been handed out

    def push(self, token: int) -> str:
        """Take a token; returns the text that is certain now and was not before, often empty."""
        self._ids.append(token)
        self._whole = self._decode(self._ids)
        # An unfinished character shows as one unknown, or one for each of its bytes: 3 at most.
        sure = len(self._whole)
        while sure > max(self._given, len(self._whole) - 3) and self._whole[sure - 1] == UNKNOWN:
            sure -= 1
        fresh, self._given = self._whole[self._given : sure], max(self._given, sure)
        if len(self._ids) >= _WINDOW:
            self._forget()
        return fresh

    def rest(self) -> str:
        """What was held back, at the end."""
        fresh, self._given = self._whole[self._given :], len(self._whole)
        return fresh

    def _forget(self) -> None:
        """Drop all but the last tokens, if that does not change how they read."""
        early, late = self._ids[:-_CONTEXT], self._ids[-_CONTEXT:]
        text = self._decode(late)
        held = len(self._whole) - self._given
        # A cut inside a character shows: the second half begins with an unknown. Some decoders drop a space
        # in front of the first token, so halves need not add up to the whole; but if they do, all is well.
        clean = text[:1] not in ("", UNKNOWN) and self._whole.endswith(text)
        if held <= len(text) and (clean or self._decode(early) + text == self._whole):
            self._ids, self._whole, self._given = late, text, len(text) - held


class Stream:
    """The text of a continuation: grows with each token, ends at the first stop string.

    Attributes:
        text: all that is certain so far, without a stop string and what follows it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str] = (),
        emit: Callable[[str], None] | None = None,
    ) -> None:
        """Begin a text.

        Args:
            decode: token ids -> text.
            stops: the first occurrence of any of these ends the text; none may be empty.
            emit: called with pieces of text, never empty, as soon as they can no longer be cut off.
        """
        self.text = ""
        self._pieces, self._stops, self._emit = Pieces(decode), tuple(stops), emit
        self._longest = max(map(len, self._stops), default=0)
        self._emitted = 0

    def push(self, token: int) -> bool:
        """Take a token; returns whether the text has ended at a stop string."""
        return self._grow(self._pieces.push(token))

    def finish(self) -> bool:
        """No token follows: hand out what was held back. Returns whether it ended at a stop string."""
        stopped = self._grow(self._pieces.rest())
        self._show(len(self.text))
        return stopped

    def _grow(self, fresh: str) -> bool:
        if not fresh:
            return False
        begin = max(0, len(self.text) - self._longest + 1)  # a stop string may have begun before
        self.text += fresh
        places = [place for stop in self._stops if (place := self.text.find(stop, begin)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self._show(len(self.text))
            return True
        self._show(len(self.text) - self._begun())
        return False

    def _begun(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        most = min(self._longest - 1, len(self.text))
        for count in range(most, 0, -1):
            end = self.text[-count:]
            if any(len(stop) > count and stop.startswith(end) for stop in self._stops):
                return count
        return 0

    def _show(self, until: int) -> None:
        if self._emit and until > self._emitted:
            self._emit(self.text[self._emitted : until])
        self._emitted = max(self._emitted, until)
