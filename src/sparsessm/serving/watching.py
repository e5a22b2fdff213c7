"""Watch what is served: snapshots of prompts, judged against the fingerprint of the text that was pruned for.

Place in the flow: the scheduler hands it every prompt; `/metrics`, `/watch` and the log say what it finds.
The statistics are `studies/drift.py`.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..runtime.generation import Model
from ..studies.drift import Fingerprint, Judged
from ..studies.traffic import LONGEST, SHORTEST, Snapshots

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px system-ui; max-width: 44em; margin: 2em auto; padding: 0 1em; color-scheme: light dark }}
td, th {{ padding: .3em 1em .3em 0; text-align: left }}
</style>
<h1>{title}</h1><p>{said}</p>
<table><tr><th>prompts judged together<th>score (1 is the threshold)<th>strangest{rows}</table></html>"""


class Monitor:
    """Of one server; written by the engine's thread, read by the web's."""

    def __init__(self, model: Model, fingerprint: Fingerprint, say: Callable[[str], None]) -> None:
        """
        Args:
            say: called with a line for each alarm.
        """
        self._snapshots = Snapshots(model, fingerprint.directions)
        self._watch = fingerprint.detector(self._snapshots.online).watch()
        self._about, self._say = fingerprint.about, say

    def prompt(self, ids: list[int], state: Tensor, logits: Tensor) -> None:
        """As `scheduler.Watcher.prompt`; prompts that are too short say nothing."""
        if len(ids) < SHORTEST:
            return
        for judged in self._watch.add(self._snapshots.take(state, logits), min(len(ids), LONGEST)):
            if judged.alarm:
                self._say(f"drift: {told(judged)}; see docs/watch.md")

    def record(self) -> dict[str, Any]:
        """Plain values: prompts seen, alarms, and the last block of each size."""
        watch = self._watch
        blocks = {str(block): judged._asdict() for block, judged in sorted(dict(watch.last).items())}
        return {
            "reference": dict(self._about),
            "prompts": watch.seen,
            "alarms": watch.alarms,
            "blocks": blocks,
        }

    def page(self) -> str:
        """The same as a page for people."""
        watch = self._watch
        last = [judged for _, judged in sorted(dict(watch.last).items())]
        title = "Alarm: the traffic has changed" if any(one.alarm for one in last) else "No alarm"
        said = f"{watch.seen} prompts seen, {watch.alarms} alarms. Reference: {self._about.get('data')}."
        rows = "".join(f"<tr><td>{one.block}<td>{one.score:.2f}<td>{html.escape(one.where)}" for one in last)
        return PAGE.format(title=title, said=html.escape(said), rows=rows)


def told(judged: Judged) -> str:
    """A block in one line."""
    where = f" ({judged.where})" if judged.strangest else ""
    return f"score {judged.score:.2f} over the last {judged.block} prompts{where}"
