"""The process in which bench/peers.py measures one model with Python: transformers, or our own runtime.

    python bench/peers_inside.py ours|fp32|bf16 DIRECTORY --threads N --steps N

Loads the model, says "ready", then for each line that it reads measures once (a prompt, decoding alone and in
a batch) and prints a line of JSON: seconds for each token of all sequences together, and by how many bytes
this process has grown since before the model was loaded (with its states and the work space of a prompt), now
and at most.
What imports and the first model cost once is not counted: the built-in model was loaded before, and dropped.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peers_files import WORDS

from sparsessm import runtime

PROMPT, BATCH = 512, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[torch.Tensor], Any]


class Running(NamedTuple):
    """A model: `prompt` reads (L,) tokens from an empty state up to the last one's logits; `begin` makes the
    empty states of a batch and returns what takes (batch,) tokens one further. `state`: bytes of one behind a
    prompt, `weights`: of those that a token meets, as far as we know them."""

    state: int
    weights: int
    vocabulary: int
    prompt: Callable[[torch.Tensor], Any]
    begin: Callable[[int], Step]


def ours(path: Path, threads: int) -> Running:
    engine = runtime.load(path, threads=threads).engine

    def room(batch: int, tokens: int) -> Any:
        """Empty states with room for the keys and values of so many tokens."""
        return engine.keys.room(engine.new_state(batch), tokens)

    def begin(batch: int) -> Step:
        state = room(batch, PROMPT)
        return lambda tokens: engine.step(tokens, state)

    def prompt(text: torch.Tensor) -> Any:
        return engine.prompt(text, room(1, len(text))[0])

    return Running(room(1, PROMPT).nbytes, engine.nbytes, engine.vocabulary, prompt, begin)


def stock(path: Path, dtype: torch.dtype) -> Running:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    pure = "cache_params" in inspect.signature(model.forward).parameters
    cache = "cache_params" if pure else "past_key_values"

    def begin(batch: int) -> Step:
        state = {cache: model(torch.ones(batch, 1, dtype=torch.int64), use_cache=True)[cache]}
        return lambda tokens: model(tokens[:, None], **state, use_cache=True)

    def prompt(text: torch.Tensor) -> Any:
        return model(text[None], use_cache=True, logits_to_keep=1)

    return Running(0, 0, model.config.vocab_size, prompt, begin)


def loaded(kind: str, path: Path, threads: int) -> Running:
    return ours(path, threads) if kind == "ours" else stock(path, DTYPES[kind])


def seconds(running: Running, steps: int, prompt: int = PROMPT) -> dict[str, float]:
    """Of each token, by what was measured."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(running.vocabulary, (prompt,), generator=generator)
    begun = time.perf_counter()
    running.prompt(text)
    found = {"prompt": (time.perf_counter() - begun) / prompt}
    for name, batch in (("decode", 1), ("batch", BATCH)):
        step = running.begin(batch)
        tokens = torch.randint(running.vocabulary, (steps, batch), generator=generator)
        begun = time.perf_counter()
        for now in tokens:
            step(now)
        found[name] = (time.perf_counter() - begun) / (steps * batch)
    return found


def status(field: str) -> int:
    """Bytes that the system says of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("ours", *DTYPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        seconds(loaded(options.kind, WORDS, options.threads), 2, 16)
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        running = loaded(options.kind, options.path, options.threads)
        gc.collect()
        weights = status("VmRSS") - before
        seconds(running, 2, 16)
        print("ready", flush=True)
        for _ in sys.stdin:
            found: dict[str, float] = dict(seconds(running, options.steps))
            sizes = {"loaded": weights, "grown": status("VmRSS") - before, "peak": status("VmHWM") - before}
            sizes |= {"state": running.state, "weights": running.weights}
            print(json.dumps(found | sizes), flush=True)


if __name__ == "__main__":
    main()
