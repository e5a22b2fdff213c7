"""What holding keys and values as bytes costs and saves: perplexity, KL, and bytes of a sequence's state.

    python bench/keys.py --json bench/results/keys.json

The built-in model of the delta rule, as the runtime computes it, on held-out windows: each is read as one
prompt, so that every prediction but the first meets rounded keys and values. KL is that of the next-token
distribution from the exact model's, in nats a token. A state is that after a window; "of it keys" are the
blocks that grow with the text. A step of decoding is timed after that many tokens: the least CPU time of the
rounds, on one thread, so other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from packed import quality
from torch import Tensor

from sparsessm import runtime
from sparsessm.data.texts import evaluation_windows
from sparsessm.runtime.generation import Model
from sparsessm.runtime.keys import FORMS

MODEL = "builtin:pydelta"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--windows", type=int, default=32)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument(
        "--after", type=int, nargs="+", default=[64, 4096], help="tokens before a timed step"
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    truth: Tensor | None = None
    for form in FORMS:
        model = runtime.load(MODEL, keys=form, threads=1)
        if truth is None:
            how = {"length": given.length, "limit": given.windows}
            windows = evaluation_windows("stdlib", model.tokenizer, **how)[0]
        truth, rows[form] = quality(model, windows, truth)
        rows[form] |= sizes(model, given.length)
        rows[form] |= {f"ms after {n}": pace(model, windows.flatten()[:n]) for n in given.after}
    first = rows[FORMS[0]]
    timed = [f"ms after {n}" for n in given.after]
    names = ["keys", "perplexity", "KL", "bytes of a state", "of it keys", *timed]
    print(f"| {' | '.join(names)} |\n{'| --- ' * len(names)}|")
    for form, row in rows.items():
        more = 100 * (row["perplexity"] / first["perplexity"] - 1)
        print(
            f"| {form} | {row['perplexity']:.4f} ({more:+.3f} %) | {row['kl']:.1e} | {row['state']:,} | "
            f"{row['keys']:,} ({row['keys'] / first['keys']:.2f}) | "
            + " | ".join(f"{row[name]:.2f}" for name in timed)
            + " |"
        )
    if given.json:
        what = {"model": MODEL, "windows": given.windows, "length": given.length}
        given.json.write_text(json.dumps(what | {"rows": rows}, indent=2) + "\n")


def sizes(model: Model, tokens: int) -> dict[str, int]:
    """Bytes of a state after so many tokens."""
    engine = model.engine
    state = engine.keys.room(engine.new_state(1), tokens)
    return {"state": state.nbytes, "keys": state.nbytes - 4 * engine.state_size}


def pace(model: Model, tokens: Tensor, rounds: int = 12, steps: int = 32) -> float:
    """Milliseconds of CPU time of a step after `tokens`, the least of the rounds."""
    engine, spent = model.engine, []
    begun = engine.keys.room(engine.new_state(1), len(tokens) + steps)[0]
    engine.prompt(tokens, begun)
    for _ in range(rounds):
        state = begun.clone()
        before = time.process_time()
        for token in tokens[:steps].split(1):
            engine.step(token, [state])
        spent.append(time.process_time() - before)
    return min(spent) / steps * 1e3


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
