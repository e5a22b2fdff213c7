"""What llama.cpp computes with the files of `sparsessm export`, against the stock model in transformers.

    python3.11 -m venv llama && llama/bin/pip install cyllama==0.2.18  # with llama.cpp b9190, compiled
    .venv/bin/python bench/gguf_logits.py --python llama/bin/python

The built-in models; the built-in Mamba-1 with half of `A_log` without memory; and models of random weights, a
FalconMamba, an untied Mamba-2 of four groups, and hybrids, with keys and values of attention in float32. For
every type: the largest difference between two logits over 256 tokens of Python, as a share of the largest
stock logit; KL in nats a token; and how often the most probable token is the same. And which share of a
longer text's tokens are others when llama.cpp splits it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import sparsessm
from sparsessm.checkpoint import export
from sparsessm.checkpoint.exporting import TYPES

TOKENS, CHARACTERS = 256, 20_000
REMOVED = 38.0  # of A_log: no memory
LLAMA = """
import json, sys
from array import array
from cyllama.llama import llama_cpp
path, out, windows, text = sys.argv[1], sys.argv[2], json.load(sys.stdin), sys.argv[3]
class Model(llama_cpp.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which get_logits_ith of 0.2.18 misses
llama_cpp.llama_backend_init()
llama_cpp.disable_logging()
model, options = Model(path, llama_cpp.LlamaModelParams(), verbose=False), llama_cpp.LlamaContextParams()
options.n_ctx = options.n_batch = options.n_ubatch = len(windows[0])
options.n_threads = options.n_threads_batch = 1
options.type_k = options.type_v = options.flash_attn_type = 0  # keys and values in float32
with open(out, "wb") as file:
    for ids in windows:
        context = llama_cpp.LlamaContext(model, options, verbose=False)
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, place, [0], True)
        context.decode(batch)
        for place in range(len(ids)):
            array("f", context.get_logits_ith(place)).tofile(file)
print(json.dumps(model.get_vocab().tokenize(text, False, False)))
"""


def random_model(kind: str, **fields: Any) -> Callable[[Path], None]:
    """Writes one of random weights with the built-in tokenizer."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
        assert isinstance(model, torch.nn.Module)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".D", "norm.weight", "norm_f.weight", "bias")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif (
                    kind in (*HYBRIDS, *DELTAS)
                    and parameter.ndim > 1
                    and "conv1d" not in name
                    and "A_log" not in name
                ):
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
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
ENDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
SMALL = {**SHAPE, **ENDS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384}
MIXER = {"mamba_d_state": 64, "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_n_groups": 2}
TURNS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
GRANITE = {
    **{"layer_types": TURNS, "shared_intermediate_size": 192, "embedding_multiplier": 3.0},
    **{"logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.1},
}
NEMOTRON = {"head_dim": 64, "ssm_state_size": 64, "mamba_num_heads": 16, "mamba_head_dim": 32, "n_groups": 2}
HYBRIDS: Mapping[str, Mapping[str, Any]] = {  # as `random_model` takes them
    "bamba": {**SMALL, **MIXER, "attn_layer_indices": [1]},
    "falcon_h1": {
        **{**SMALL, **MIXER, "mamba_n_heads": 12, "mamba_d_ssm": 384, "tie_word_embeddings": True},
        **{"embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "mlp_multipliers": [0.8, 1.3]},
        **{"key_multiplier": 0.7, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9},
        **{
            "ssm_multipliers": [1.2, 0.8, 1.1, 0.9, 1.3],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.75,
        },
    },
    "granitemoehybrid": {**SMALL, **MIXER, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **{**SMALL, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 32},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    },
    "nemotron_h": {
        **{name: value for name, value in {**SMALL, **NEMOTRON}.items() if name != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    },
}
DELTA = {  # of the delta rule; two value heads share a key head
    **{**SHAPE, **ENDS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64},
    **{"linear_value_head_dim": 64, "intermediate_size": 384},
    **{"layer_types": ["linear_attention", "full_attention"] * 2},
}
DELTAS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
ROUTED = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "shared_expert_intermediate_size": 192,
}
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True}
EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    **{"moe_shared_expert_intermediate_size": 192, "routed_scaling_factor": 2.5},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
}
HEADS = {"num_heads": 16, "head_dim": 32, "n_groups": 4, "state_size": 64}
MODELS: Mapping[str, str | Callable[[Path], None]] = {
    "builtin:pycode": "builtin:pycode",
    "builtin:pycode2": "builtin:pycode2",
    "builtin:pydelta": "builtin:pydelta",
    "builtin:pyhybrid": "builtin:pyhybrid",
    "half of A_log": memoryless,
    "falcon_mamba": random_model("falcon_mamba", **SHAPE, mixer_rms_eps=1e-5),
    "mamba2, 4 groups": random_model("mamba2", **SHAPE, **HEADS),
    **{kind: random_model(kind, **fields) for kind, fields in HYBRIDS.items()},
    "qwen3_5_text": random_model("qwen3_5_text", **DELTA),
    "qwen3_5_moe_text": random_model("qwen3_5_moe_text", **DELTA, **ROUTED),
    "qwen3_next": random_model("qwen3_next", **DELTA, **ROUTED),
    "granitemoehybrid, no experts": random_model(
        "granitemoehybrid", **{**HYBRIDS["granitemoehybrid"], **DENSE}
    ),
    "nemotron_h, experts": random_model("nemotron_h", **{**HYBRIDS["nemotron_h"], **EXPERTS}),
}


def computed(python: str, file: Path, windows: list[list[int]], text: str = "") -> tuple[Tensor, list[int]]:
    """What llama.cpp makes of a file: its logits (windows, length, vocabulary), and the tokens of a text.

    Args:
        python: of an environment with cyllama. windows: of tokens, all of one length.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits"
        words = [python, "-c", LLAMA, str(file), str(out), text]
        done = subprocess.run(words, input=json.dumps(windows).encode(), capture_output=True, check=True)
        values = torch.from_file(str(out), size=out.stat().st_size // 4).clone()
    return values.view(len(windows), len(windows[0]), -1), json.loads(done.stdout.splitlines()[-1])


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
    parser.add_argument("--model", choices=MODELS, action="append", help="all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows of other models in it stay")
    options = parser.parse_args()
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:CHARACTERS]
    rows = []
    models = {label: MODELS[label] for label in options.model or MODELS}
    if options.json and options.json.exists():
        rows = [row for row in json.loads(options.json.read_text()) if row["model"] not in models]
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        for label, made in models.items():
            source: Any = made
            if not isinstance(made, str):
                source = folder / label.replace(" ", "-")
                made(source)
            checkpoint: Any = sparsessm.load(source)
            known = checkpoint.tokenizer(text, verbose=False).input_ids
            ids = known[:TOKENS]
            stock = checkpoint.model(torch.tensor([ids])).logits[0]
            for kind in TYPES:
                file = folder / "model.gguf"
                export(source, file, type=kind, force=True)
                found, said = computed(options.python, file, [ids], text)
                row = {"model": label, "type": kind, **compared(found[0], stock)}
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
