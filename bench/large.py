"""Peak memory and time of whole commands on models of large shapes, by the number of layers.

    python bench/large.py --shape mamba-2.8b --layers 2 --layers 4 --memory 6GB

A directory is written on the spot with random weights of the real shapes (in bfloat16, layer by layer) and
the tokenizer of the built-in model; a token beyond its vocabulary does not occur in the text. Each command
runs in a process of its own. The peak is the kernel's ru_maxrss, which counts every page of a mapped file
that was touched, and what the process had before it became another program: so the weights are made in a
process of their own too. The peak must not depend on the number of layers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from memory import cpu


class Shape(NamedTuple):
    """Of a model: transformers' model type, and the fields of its configuration that are not the defaults."""

    kind: str
    fields: dict[str, Any]
    layers: int


SHAPES = {
    "mamba-130m": Shape("mamba", {"hidden_size": 768, "vocab_size": 50280}, 24),
    "mamba-1.4b": Shape("mamba", {"hidden_size": 2048, "vocab_size": 50280}, 48),
    "mamba-2.8b": Shape("mamba", {"hidden_size": 2560, "vocab_size": 50280}, 64),
    "falcon-mamba-7b": Shape(
        "falcon_mamba",
        {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "time_step_rank": 256,
            "vocab_size": 65024,
            "tie_word_embeddings": False,
        },
        64,
    ),
}
COMMANDS = ("prune", "eval", "pack", "inspect")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="mamba-2.8b")
    options.add_argument("--layers", type=int, action="append", help="several: each in turn [2 and 4]")
    options.add_argument("--memory", default="6GB")
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--limit", type=int, default=16, help="windows of eval")
    options.add_argument("--command", action="append", choices=COMMANDS, help="[all]")
    options.add_argument("--option", action="append", default=[], help="one more of prune, such as --no-eval")
    options.add_argument("--folder", type=Path, help="where the models are made")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    rows = []
    print(f"{'command':8} {'layers':>6} {'model':>10} {'peak':>10} {'seconds':>8} {'of CPU':>8}")
    for layers in given.layers or [2, 4]:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            stock, out = Path(name) / "stock", Path(name) / "out"
            made(SHAPES[given.shape], layers, stock)
            size = sum(file.stat().st_size for file in stock.iterdir())
            commands = {
                "prune": [
                    *("prune", stock, "-o", out, "--memory", given.memory, *given.option),
                    *("--samples", given.samples, "--length", given.length),
                ],
                "eval": [
                    *("eval", stock, "--memory", given.memory),
                    *("--limit", given.limit, "--length", given.length),
                ],
                "pack": ["pack", out if "prune" in (given.command or COMMANDS) else stock, Path(name) / "p"],
                "inspect": ["inspect", stock],
            }
            for command in given.command or COMMANDS:
                row = {"command": command, "layers": layers, "model": size, **ran(commands[command])}
                rows.append(row)
                sizes = (f"{row[key] / 2**20:6.0f} MiB" for key in ("model", "peak"))
                print(
                    f"{command:8} {layers:6}", *sizes, f"{row['seconds']:8.0f} {row['cpu']:8.0f}", flush=True
                )
    if given.json:
        what = {name: value for name, value in vars(given).items() if name not in ("json", "folder")}
        given.json.write_text(json.dumps({"machine": cpu(), "given": what, "rows": rows}, indent=2) + "\n")


def ran(arguments: list[Any]) -> dict[str, float]:
    """One command in a process of its own: bytes at its peak, seconds."""
    began = time.perf_counter()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-m", "sparsessm", *map(str, arguments), "--quiet"])
    _, status, used = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{arguments[0]} ended with {code}")
    seconds = time.perf_counter() - began
    return {"peak": used.ru_maxrss * 1024, "seconds": seconds, "cpu": used.ru_utime + used.ru_stime}


def made(shape: Shape, layers: int, folder: Path) -> None:
    """`write` in a process of its own, so that this one stays small."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(shape, layers, folder))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"writing the model ended with {writer.exitcode}")


def write(shape: Shape, layers: int, folder: Path) -> None:
    """A directory of the stock format, a shard a layer; no more than a layer is in memory."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import sparsessm

    config = transformers.AutoConfig.for_model(shape.kind, num_hidden_layers=layers, **shape.fields)
    with torch.device("meta"):
        tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir()
    config.save_pretrained(folder)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in tensors:
        parts.setdefault(name.split("layers.")[-1].split(".")[0] if "layers." in name else "rest", []).append(
            name
        )
    for number, names in enumerate(parts.values()):
        file = f"model-{number:05d}.safetensors"
        save_file(
            {name: values(name, tensors[name].shape) for name in names}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(sparsessm.__file__).parent / "builtin/pycode" / file, folder)


def values(name: str, shape: Any) -> Any:
    """Random weights in bfloat16 of about the size that training leaves."""
    import torch

    if name.endswith("A_log"):
        return torch.arange(1, shape[1] + 1).log().expand(shape).contiguous().bfloat16()
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("dt_proj.bias"):
        return torch.full(shape, -4.0, dtype=torch.bfloat16)
    scale = 0.02 if "embeddings" in name or "lm_head" in name else (shape[-1] or 1) ** -0.5
    return (torch.randn(shape) * scale).bfloat16()


if __name__ == "__main__":
    main()
