"""The files that bench/peers.py measures: a model of random weights of each shape, as every runtime wants it.

Stock directories in bfloat16 and float32 (`transformers`, and our dense engine); packed ones of int8, of half
of the weights in bfloat16, and of codes that take so many bits as those of the dial (bench/runtime.py says
how they are drawn); GGUF in BF16 by `sparsessm export`, and of that by llama.cpp's own llama-quantize all its
other types. A file that is there already is used as it is.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runtime import SHAPES2, configuration, encoded, of_few_bits, tensors  # bench/runtime.py
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import sparsessm
from sparsessm import checkpoint
from sparsessm.checkpoint import packed_file
from sparsessm.checkpoint.container import PACKED

WORDS = Path(sparsessm.__file__).parent / "builtin/pycode"  # has a tokenizer
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
QUANTISED = ("Q8_0", "Q4_0", "Q4_K", "Q2_K")  # as llama-quantize names them
FIELDS = "vocab_size hidden_size state_size num_hidden_layers layer_norm_epsilon tie_word_embeddings".split()


class Missing(Exception):
    """What a file would be made with is not here."""


def made(folder: Path, shape: str, name: str, llama: Path | None) -> Path:
    """A file or directory of a shape, one of `NAMES`; made if it is not there.

    Args:
        folder: of all shapes. llama: where llama.cpp's programs are.
    """

    def write(target: Path) -> None:
        if name.endswith(".gguf"):
            _gguf(folder, shape, name.removesuffix(".gguf"), llama, target)
        else:
            DIRECTORIES[name](folder, shape, target)

    return once(folder / shape / name, write)


def once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`; if it is not there, what `write` makes, whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"partial-{target.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    print(f"making {target}", flush=True)
    write(partial)
    partial.rename(target)
    return target


def weights(path: Path) -> int:
    """Bytes of the weights' files on disk."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


def types(path: Path) -> dict[str, int]:
    """Bytes of the tensors of a GGUF file, by their type: what llama-quantize chose."""
    from gguf import GGUFReader

    found: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        found[tensor.tensor_type.name] += int(tensor.n_bytes)
    return dict(found.most_common())


def _gguf(folder: Path, shape: str, kind: str, llama: Path | None, target: Path) -> None:
    if kind == "BF16":
        checkpoint.export(made(folder, shape, "stock-bf16", llama), target, type="bf16", force=True)
        return
    quantise(made(folder, shape, "BF16.gguf", llama), target, kind, llama)


def quantise(whole: Path, target: Path, kind: str, llama: Path | None) -> None:
    """A GGUF file in another type, by llama.cpp's own program."""
    if llama is None:
        raise Missing("--llama not given")
    command = [llama / "llama-quantize", whole, target, kind, 1]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Missing(f"llama-quantize to {kind} failed: {done.stdout.decode(errors='replace')[-300:]}")


def _stock(dtype: torch.dtype) -> Callable[[Path, str, Path], None]:
    def write(folder: Path, shape: str, target: Path) -> None:
        config = configuration(shape)
        fields = {name: getattr(config, name) for name in FIELDS}
        with torch.device("meta"):
            if shape in SHAPES2:
                heads = {name: getattr(config, name) for name in ("num_heads", "head_dim", "n_groups")}
                model: Any = Mamba2ForCausalLM(Mamba2Config(**fields, **heads))
            else:
                model = MambaForCausalLM(MambaConfig(**fields))
        model = model.to(dtype).to_empty(device="cpu").eval()
        model.tie_weights()
        missing = dict(model.named_parameters())
        for name, values, _ in tensors(config, "none"):
            missing.pop(name).data.copy_(values)
        if missing:
            raise AssertionError(f"without values: {sorted(missing)}")
        model.save_pretrained(target)
        for name in BESIDE[2:]:
            shutil.copy(WORDS / name, target)

    return write


def _packed(made_of: Callable[[Any], Any]) -> Callable[[Path, str, Path], None]:
    """A packed directory with the small files of the stock one."""

    def write(folder: Path, shape: str, target: Path) -> None:
        beside = made(folder, shape, "stock-bf16", None)
        held = made_of(configuration(shape))
        target.mkdir()
        for name in BESIDE:
            if (beside / name).exists():
                shutil.copy(beside / name, target)
        packed_file.write(target / PACKED, "transformers", held)

    return write


def _few(bits: float) -> Callable[[Path, str, Path], None]:
    return _packed(lambda config: of_few_bits(config, bits)[1])


DIRECTORIES: dict[str, Callable[[Path, str, Path], None]] = {
    "stock-bf16": _stock(torch.bfloat16),
    "stock-fp32": _stock(torch.float32),
    "half-bf16": _packed(lambda config: encoded(config, "bf16", "same", "real")[1]),
    "int8": _packed(lambda config: encoded(config, "int8", "int8", "none")[0]),
    "bits-4.25": _few(4.25),
    "bits-3.25": _few(3.25),
    "bits-2.25": _few(2.25),
}
NAMES = (*DIRECTORIES, "BF16.gguf", *(f"{kind}.gguf" for kind in QUANTISED))
