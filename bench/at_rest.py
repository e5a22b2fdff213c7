"""Peak memory of pack, unpack and inspect by the number of layers, which it must not depend on.

    python bench/at_rest.py --layers 4 --layers 32 --json bench/results/at_rest.json

Models have the width of mamba-370m (random weights in bfloat16, half of them zero, the tokenizer of the
built-in model) and the layers that are asked for. Each command runs in a process of its own, after it did the
same with the built-in model: imports and what torch sets up at the first use are in `process`. The peak is
the kernel's (VmHWM, set back before the command), which counts mapped files too. `load` is there to compare:
it holds the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import cpu, status

COMMANDS = ("inspect", "pack", "unpack", "load")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--layers", type=int, action="append")
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--vocabulary", type=int, default=50280)
    options.add_argument("--original", action="store_true", help="as a pytorch_model.bin of state-spaces")
    options.add_argument("--json", type=Path)
    options.add_argument("--folder", type=Path, help="for the models; needs about three times the largest")
    options.add_argument("--one", nargs=3, metavar=("COMMAND", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one)))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'command':8} {'layers':>6} {'source':>10} {'peak':>10} {'process':>10} {'seconds':>8}")
    for layers in given.layers or [4, 32]:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            numbers = (layers, given.width, given.vocabulary, given.original)
            code = f"import at_rest as bench; bench.write(bench.Path({name!r}) / 'stock', *{numbers})"
            made = [sys.executable, "-c", code]  # in a process of its own: this one stays small
            subprocess.run(made, check=True, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
            for command in COMMANDS:
                source, out = ("packed", "stock") if command == "unpack" else ("stock", "packed")
                if command == "unpack":
                    shutil.rmtree(folder / out)
                ran = [sys.executable, __file__, "--one", command, str(folder / source), str(folder / out)]
                done = subprocess.run(ran, check=True, capture_output=True, text=True)
                row = {"command": command, "layers": layers} | json.loads(done.stdout)
                rows.append(row)
                sizes = (f"{row[name] / 2**20:6.0f} MiB" for name in ("source", "peak", "process"))
                print(f"{command:8} {layers:6}", *sizes, f"{row['seconds']:8.1f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"cpu": cpu(), "rows": rows}, indent=2) + "\n")


def write(folder: Path, layers: int, width: int, vocabulary: int, original: bool) -> None:
    """A directory as a run of `prune` leaves one: half of every matrix is zero, and the record says so."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    import sparsessm

    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers}
    torch.set_default_dtype(torch.bfloat16)
    model = MambaForCausalLM(MambaConfig(state_size=16, **sizes))
    targets = []
    for name, tensor in model.named_parameters():
        if name.endswith("proj.weight"):
            tensor.data[torch.rand(tensor.shape) < 0.5] = 0
            zeros = int((tensor == 0).sum())
            row = {
                "target": name,
                "layer": int(name.split(".")[2]),
                "family": "projections",
                "method": "random",
            }
            row |= {"pattern": "unstructured", "removed": "zero", "total": tensor.numel(), "pruned": zeros}
            targets.append(row)
    folder.mkdir()
    if original:
        fields = {"d_model": width, "n_layer": layers, "vocab_size": vocabulary, "ssm_cfg": {"d_state": 16}}
        (folder / "config.json").write_text(json.dumps(fields))
        tensors = model.state_dict()
        torch.save(
            {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors.items()},
            folder / "pytorch_model.bin",
        )
    else:
        model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(sparsessm.__file__).parent / "builtin/pycode" / file, folder)
    pruned, total = (sum(row[name] for row in targets) for name in ("pruned", "total"))
    totals = {"projections": {"pruned": pruned, "total": total, "sparsity": pruned / total}}
    record = {"format": 1, "recipe": {}, "targets": targets, "totals": totals}
    (folder / "pruning.json").write_text(json.dumps(record))


def measured(command: str, source: str, out: str) -> dict[str, Any]:
    """Run a command in this process: bytes, and seconds."""
    with tempfile.TemporaryDirectory() as small:
        run("pack", "builtin:pycode", f"{small}/packed")
        run(command, f"{small}/packed" if command == "unpack" else "builtin:pycode", f"{small}/out")
    gc.collect()
    process = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    run(command, source, out)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in Path(source).iterdir())
    return {"source": size, "peak": status("VmHWM") - process, "process": process, "seconds": seconds}


def run(command: str, source: str, out: str) -> None:
    from sparsessm import checkpoint
    from sparsessm.evaluation.inspection import inspection

    if command == "inspect":
        opened = checkpoint.open_checkpoint(source)
        inspection(checkpoint.at_rest(opened), source, opened.record)
    elif command == "load":
        checkpoint.load(source)
    else:
        {"pack": checkpoint.pack, "unpack": checkpoint.unpack}[command](source, out)


if __name__ == "__main__":
    main()
