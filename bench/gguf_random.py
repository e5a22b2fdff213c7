"""Writes random-weight Mamba-1 models as GGUF, for llama.cpp's llama-bench, which `bench/peers.py` runs.

    python bench/gguf_random.py --shape 130m --type bf16 --type q8_0 --type q4_0 --into GGUF_FOLDER

Needs numpy and the package `gguf` (not among the project's dependencies: use an environment of its own). Key
and tensor names, and which tensor takes which type, are those of llama.cpp's conversion script and of its
llama-quantize: 1-d tensors, A, D and the convolution stay fp32; a matrix whose rows do not divide into
blocks of 32 (dt_proj of the 130m) becomes fp16; the head is tied (no output.weight) and, at q4_0, Q6_K. All
layers get the same numbers, each its own copy in the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

SHAPES = {"130m": (768, 24), "370m": (1024, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}  # d_model, layers
TYPES = {"f32": Type.F32, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
VOCABULARY, STATES, WINDOW, EXPAND = 50280, 16, 4, 2
SPREAD = 0.02  # standard deviation of the weights


def q6_k(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of 256 weights in 210 bytes (gguf-py reads Q6_K but does not write it): 192 bytes of
    6-bit values, uniform around 0 with deviation 18.5; 16 scales; one fp16 scale."""
    blocks = rng.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = 16
    blocks[..., 208:] = np.array([SPREAD / (16 * 18.5)], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def tensors(width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One layer in fp32, by its name inside the block."""
    inner, rank = EXPAND * width, width // 16
    steps = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), inner))
    shapes = {
        "ssm_in.weight": (2 * inner, width),
        "ssm_conv1d.weight": (inner, WINDOW),
        "ssm_x.weight": (rank + 2 * STATES, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_out.weight": (width, inner),
    }
    drawn = {name: SPREAD * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return drawn | {
        "attn_norm.weight": np.ones(width, np.float32),
        "ssm_conv1d.bias": np.zeros(inner, np.float32),
        "ssm_dt.bias": np.log(np.expm1(steps)).astype(np.float32),  # softplus turns it back into the step
        # A itself, not its logarithm:
        "ssm_a": np.tile(-np.arange(1, STATES + 1, dtype=np.float32), (inner, 1)),
        "ssm_d": np.ones(inner, np.float32),
    }


def stored(name: str, tensor: np.ndarray, wanted: Type) -> tuple[np.ndarray, Type]:
    if tensor.ndim == 1 or name == "ssm_a" or "conv1d" in name or wanted is Type.F32:
        return tensor, Type.F32
    if tensor.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return tensor.astype(np.float16), Type.F16
    return gguf.quants.quantize(tensor, wanted), wanted


def write(shape: str, type_name: str, path: Path) -> None:
    width, layers = SHAPES[shape]
    wanted, rng = TYPES[type_name], np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_name(f"mamba-{shape} (random weights)")
    writer.add_context_length(2**20)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(layers)
    writer.add_vocab_size(VOCABULARY)
    writer.add_ssm_conv_kernel(WINDOW)
    writer.add_ssm_inner_size(EXPAND * width)
    writer.add_ssm_state_size(STATES)
    writer.add_ssm_time_step_rank(width // 16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(FILE_TYPES[type_name])
    writer.add_tokenizer_model("no_vocab")
    if type_name == "q4_0":
        writer.add_tensor("token_embd.weight", q6_k(VOCABULARY, width, rng), raw_dtype=Type.Q6_K)
    else:
        table = SPREAD * rng.standard_normal((VOCABULARY, width), dtype=np.float32)
        data, kind = stored("token_embd.weight", table, wanted)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    layer = {name: stored(name, tensor, wanted) for name, tensor in tensors(width, rng).items()}
    for index in range(layers):
        for name, (data, kind) in layer.items():
            writer.add_tensor(f"blk.{index}.{name}", data, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32), raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", required=True)
    parser.add_argument("--type", choices=TYPES, action="append", required=True)
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for shape in options.shape:
        for type_name in options.type:
            path = options.into / f"mamba-{shape}-{type_name}.gguf"
            write(shape, type_name, path)
            print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
