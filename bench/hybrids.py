"""Decoding of hybrids at real shapes, random weights, beside stock transformers in bfloat16.

    python bench/hybrids.py --threads 2 --json bench/results/hybrids.json
    python bench/hybrids.py --shape qwen3.5-0.8b --batches 1 16

A model has one and two periods of its layers (three of the delta rule and one of attention; nine of Mamba-2
and one of attention; nine layers that have both). What more periods would cost follows from the two: tokens
per second of the whole depth are extrapolated, and every line says so. All engines run in turn, round by
round; printed are medians. A period is large enough for its weights not to stay in a cache from step to step.
Shapes are near the published ones; not every size could be checked here (`SHAPES` has them).
Options: --shape NAME..., --threads N (2), --batches N... (1), --rounds N (7), --context N tokens before (64),
--json FILE.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import cpu
from transformers import AutoConfig, AutoModelForCausalLM

from sparsessm.checkpoint.encoding import encode
from sparsessm.runtime.engine import NativeEngine

LINEAR, FULL = "linear_attention", "full_attention"
SHAPES: dict[str, tuple[str, int, list[str], dict[str, Any]]] = {  # model type, layers, a period, fields
    "qwen3.5-0.8b": (
        "qwen3_5_text",
        24,
        [LINEAR, LINEAR, LINEAR, FULL],
        {
            **{"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "head_dim": 256},
            **{"num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
            **{"vocab_size": 248320, "tie_word_embeddings": True},
        },
    ),
    "qwen3.5-2b": (
        "qwen3_5_text",
        24,
        [LINEAR, LINEAR, LINEAR, FULL],
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 8, "head_dim": 256},
            **{"num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
            **{"vocab_size": 248320, "tie_word_embeddings": True},
        },
    ),
    "granite-4.0-h-micro": (
        "granitemoehybrid",
        40,
        [*[LINEAR] * 5, FULL, *[LINEAR] * 4],
        {
            **{"hidden_size": 2048, "shared_intermediate_size": 8192, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "mamba_n_heads": 64, "mamba_d_state": 128, "num_local_experts": 0},
            **{"vocab_size": 100352, "tie_word_embeddings": True, "num_experts_per_tok": 0},
        },
    ),
    "falcon-h1-0.5b": (
        "falcon_h1",
        36,
        [""] * 9,
        {
            **{"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8},
            **{"num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24},
            **{"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "vocab_size": 32784},
        },
    ),
}


def configuration(shape: str, periods: int) -> Any:
    """Of a shape with so many periods of layers."""
    kind, _, period, fields = SHAPES[shape]
    told = copy.deepcopy(fields) | {"num_hidden_layers": periods * len(period)}
    if all(period):
        told["layer_types"] = period * periods
    return AutoConfig.for_model(kind, **told, pad_token_id=0, bos_token_id=0, eos_token_id=0)


def ours(model: Any, int8: bool) -> NativeEngine:
    """The native engine with the weights of a stock model in bfloat16, or its large matrices in int8."""
    tensors, seen = {}, set[int]()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        held, large = value.detach(), value.ndim == 2 and value.numel() > 1 << 16
        tensors[name] = encode(
            name, held if value.ndim == 2 else held.float(), int8=int8 and large, kind="dense"
        )
    return NativeEngine(model.config, tensors)


def stepping(engine: NativeEngine, batch: int, context: int) -> Callable[[], object]:
    """A function that decodes one token of each sequence behind `context` tokens."""
    states = engine.keys.room(engine.new_state(batch), context + 512)
    tokens = torch.zeros(batch, dtype=torch.int64)
    for _ in range(context):
        engine.step(tokens, states)
    return lambda: engine.step(tokens, states)


def stock(model: Any, batch: int, context: int) -> Callable[[], object]:
    """The same by transformers."""
    with torch.inference_mode():
        out = model(torch.zeros(batch, context, dtype=torch.int64), use_cache=True)
    cache, tokens = out.past_key_values, torch.zeros(batch, 1, dtype=torch.int64)

    def step() -> object:
        with torch.inference_mode():
            return model(tokens, past_key_values=cache, use_cache=True)

    return step


def seconds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of a step of each, taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(4):
                step()
            if number:  # the first is for caches
                found[name].append((time.perf_counter() - began) / 4)
    return {name: statistics.median(times) for name, times in found.items()}


def measured(shape: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step with one and with two periods, and extrapolated to all layers."""
    kind, layers, period, _ = SHAPES[shape]
    times, read = [], []
    for periods in (1, 2):
        config = configuration(shape, periods)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        engines = {"ours bf16": ours(model, False), "ours int8": ours(model, True)}
        steps = {name: stepping(engine, batch, options.context) for name, engine in engines.items()}
        steps["transformers bf16"] = stock(model, batch, options.context)
        times.append(seconds(steps, options.rounds))
        read.append({name: engine.nbytes for name, engine in engines.items()})
        state = engines["ours bf16"].new_state(1).nbytes
        del engines, steps, model
        gc.collect()
    whole = layers / len(period)

    def extrapolated(first: float, second: float) -> float:
        return first + (whole - 1) * (second - first)

    found: dict[str, Any] = {
        "model_type": kind,
        "layers": layers,
        "batch": batch,
        "state of two periods": state,
    }
    for name in times[0]:
        step = extrapolated(times[0][name], times[1][name])
        found[name] = {
            "ms of one period": 1e3 * times[0][name],
            "ms of two": 1e3 * times[1][name],
            "tokens/s, extrapolated": batch / step,
        }
        if name in read[0]:
            nbytes = extrapolated(read[0][name], read[1][name])
            found[name] |= {"bytes a step": nbytes, "GB/s": nbytes / step / 1e9}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, Any] = {
        "cpu": cpu(),
        "threads": options.threads,
        "transformers": transformers.__version__,
    }
    for shape in options.shape:
        for batch in options.batches:
            found[f"{shape}, batch {batch}"] = told = measured(shape, batch, options)
            base = told["transformers bf16"]["tokens/s, extrapolated"]
            for name, row in told.items():
                if isinstance(row, dict):
                    speed = row["tokens/s, extrapolated"]
                    more = f", {row['GB/s']:.1f} GB/s" if "GB/s" in row else ""
                    whole = f"{speed:.1f} tokens/s (extrapolated to {told['layers']} layers)"
                    times = f"{speed / base:.2f} times transformers"
                    print(f"{shape}, batch {batch}, {name}: {whole}, {times}{more}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
