"""What llama.cpp computes with the files of `sparsessm export`, against the stock model in transformers.

    python3.11 -m venv llama && llama/bin/pip install cyllama==0.2.18  # with llama.cpp b9190, compiled
    .venv/bin/python bench/gguf_logits.py --python llama/bin/python

The built-in models; the built-in Mamba-1 with half of `A_log` without memory; and models of random weights, a
FalconMamba and an untied Mamba-2 of four groups. For every type: the largest difference between two logits
over 256 tokens of Python, as a share of the largest stock logit; KL in nats a token; and how often the most
probable token is the same. And which share of a longer text's tokens are others when llama.cpp splits it.
"""

from __future__ import annotations

import argparse
import array
import difflib
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

import sparsessm
from sparsessm.checkpoint import export
from sparsessm.checkpoint.exporting import TYPES

TOKENS, CHARACTERS = 256, 20_000
REMOVED = 38.0  # of A_log: no memory
LLAMA = """
import json, sys
from array import array
from cyllama.llama import llama_cpp
path, out, ids, text = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
class Model(llama_cpp.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which get_logits_ith of 0.2.18 misses
llama_cpp.llama_backend_init()
llama_cpp.disable_logging()
model, options = Model(path, llama_cpp.LlamaModelParams(), verbose=False), llama_cpp.LlamaContextParams()
options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
options.n_threads = options.n_threads_batch = 1
context = llama_cpp.LlamaContext(model, options, verbose=False)
batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
for place, token in enumerate(ids):
    batch.add(token, place, [0], True)
context.decode(batch)
with open(out, "wb") as file:
    for place in range(len(ids)):
        array("f", context.get_logits_ith(place)).tofile(file)
print(json.dumps(model.get_vocab().tokenize(text, False, False)))
"""


def random_model(kind: Any, config: Any) -> Callable[[Path], None]:
    """Writes one of random weights with the built-in tokenizer."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".D", "norm.weight", "norm_f.weight", "bias")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.bfloat16().save_pretrained(folder)
        sparsessm.load("builtin:pycode").tokenizer.save_pretrained(folder)

    return write


def memoryless(folder: Path) -> None:
    """The built-in Mamba-1 without every second entry of A_log."""
    checkpoint = sparsessm.load("builtin:pycode")
    with torch.no_grad():
        for layer in checkpoint.model.backbone.layers:  # pyright: ignore[reportAttributeAccessIssue]
            layer.mixer.A_log[:, ::2] = REMOVED
    sparsessm.save(checkpoint, folder)


SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096, "tie_word_embeddings": False}
HEADS = {"num_heads": 16, "head_dim": 32, "n_groups": 4, "state_size": 64}
MODELS: Mapping[str, str | Callable[[Path], None]] = {
    "builtin:pycode": "builtin:pycode",
    "builtin:pycode2": "builtin:pycode2",
    "half of A_log": memoryless,
    "falcon_mamba": random_model(FalconMambaForCausalLM, FalconMambaConfig(**SHAPE, mixer_rms_eps=1e-5)),
    "mamba2, 4 groups": random_model(Mamba2ForCausalLM, Mamba2Config(**SHAPE, **HEADS)),
}


def compared(found: Tensor, stock: Tensor) -> dict[str, float]:
    log, stock_log = found.double().log_softmax(-1), stock.double().log_softmax(-1)
    return {
        "difference": float((found - stock).abs().max() / stock.abs().max()),
        "kl": float((stock_log.exp() * (stock_log - log)).sum(-1).mean()),
        "same": float((found.argmax(-1) == stock.argmax(-1)).double().mean()),
    }


def in_common(some: list[int], others: list[int]) -> int:
    """Tokens of the parts that are the same."""
    return sum(part.size for part in difflib.SequenceMatcher(None, some, others, False).get_matching_blocks())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of an environment with cyllama")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:CHARACTERS]
    rows = []
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        for label, made in MODELS.items():
            source = made
            if not isinstance(made, str):
                source = folder / label.replace(" ", "-")
                made(source)
            checkpoint: Any = sparsessm.load(source)
            known = checkpoint.tokenizer(text, verbose=False).input_ids
            ids = known[:TOKENS]
            stock = checkpoint.model(torch.tensor([ids])).logits[0]
            for kind in TYPES:
                file, out = folder / "model.gguf", folder / "logits"
                export(source, file, type=kind, force=True)
                words = [options.python, "-c", LLAMA, str(file), str(out), json.dumps(ids), text]
                done = subprocess.run(words, capture_output=True, check=True)
                said = json.loads(done.stdout.splitlines()[-1])
                values = array.array("f", out.read_bytes())
                found = torch.tensor(values).view(len(ids), -1)
                row = {"model": label, "type": kind, **compared(found, stock)}
                row["other tokens"] = 1 - in_common(said, known) / len(said)
                rows.append(row)
                print(
                    f"{label:18} {kind:5} difference {row['difference']:.1e}  KL {row['kl']:.1e}  same token "
                    f"{row['same']:.1%}  other tokens {row['other tokens']:.1%}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
