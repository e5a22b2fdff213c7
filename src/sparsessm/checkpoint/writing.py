"""Write a checkpoint in the format it came in, whole or not at all.

The files that came with the model go out byte for byte, its tensors in the dtypes they came in; only
`pruning.json` and the model card are ours. That the directory appears in one step is `atomic.py`'s part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from ..architectures.own import Own
from ..data.foreign import from_json
from . import atomic, bin_file, state_spaces
from .assembly import stock_model, untied
from .companions import CARD, GENERATION, RECORD, TEMPLATES, is_tokenizer_file, is_usual, unusual
from .encoding import finite
from .files import BIN, CONFIG, few, parse_json, read_json, write_safetensors
from .known_fields import optional
from .opened import local_folder, quiet, stock_config
from .reading import Checkpoint
from .stock_names import in_files
from .tensor_file import Form
from .values import stored_forms, stored_tensor
from .wrapped import inside, is_wrapped, with_changes

# Names that older files have beside today's; stock code reads neither, but other readers do.
_OLDER = {"num_hidden_layers": "n_layer", "intermediate_size": "d_inner"}
_NOT_COMPARED = {"dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures"}


def refuse_existing(path: str | os.PathLike[str], force: bool, source: str | None = None) -> None:
    """Refuse a target that `save` could not take; meant to be asked before hours of work.

    Raises:
        ValueError: `path` exists and `force` is false; it is a file, or a directory that is no checkpoint; it
            overlaps the directory of `source`; or as `atomic.refuse_target`.
    """
    shown = os.fspath(path)
    target = atomic.refuse_target(path)
    origin = local_folder(source) if source is not None else None
    if origin is not None:
        origin = origin.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise ValueError(f"{shown!r} overlaps the source {source!r}; write the result somewhere else")
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{shown!r} is a file; name a directory for the result")
        if not force:
            raise ValueError(
                f"{shown!r} exists; choose another name, or replace it with force=True (--force)"
            )
        if any(target.iterdir()) and (other := foreign(target)):
            raise ValueError(
                f"{shown!r} is not replaced, because it is not a checkpoint ({other}); remove it yourself"
            )


def foreign(target: Path) -> str | None:
    """Why a directory is not a checkpoint and nothing else, None if it is: a slip must not take a project."""
    if not (target / CONFIG).is_file():
        return f"no {CONFIG}"
    if not {"model_type", "d_model"} & read_json(target / CONFIG).keys():
        return f"{CONFIG} is of something else"
    listed = _listed(target)
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        usual = is_usual(name) or name in listed
        if path.is_dir() and not path.is_symlink():
            usual = any(inside.startswith(f"{name}/") for inside in listed) or name == TEMPLATES
        if not usual:
            return f"it also has {name!r}"
    return None


def _listed(target: Path) -> set[str]:
    """Files that the record of a result lists: they came from its source, and are in that still."""
    if not (target / RECORD).is_file():
        return set()
    names = read_json(target / RECORD).get("files")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    record: Mapping[str, Any] | None = None,
    card: str | None = None,
    force: bool = False,
) -> Path:
    """Write the checkpoint in the format it came in, whole or not at all.

    Args:
        checkpoint: what to write; each tensor in the dtype `checkpoint.stored` names for it, else in its own.
        path: the directory to make.
        record: content of `pruning.json`.
        card: text of `README.md`.
        force: replace a checkpoint that is already there.

    Raises:
        ValueError: as `refuse_existing`; a tensor is not finite in its stored dtype; the record is not JSON.
        OSError: the disk is full, or writing failed otherwise; nothing is left behind, an old target is
            intact.
    """
    ours = beside(record, card)
    return write(checkpoint, path, stock_weights(checkpoint), stored_bytes(checkpoint), ours, force)


def beside(record: Mapping[str, Any] | None, card: str | None) -> dict[str, bytes]:
    """Content of `pruning.json` and `README.md`, by name, of what there is.

    Raises:
        ValueError: the record is not JSON.
    """
    try:
        content = None if record is None else json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{RECORD} cannot hold this record: {error}") from error
    texts = {RECORD: content, CARD: card}
    return {name: text.encode() for name, text in texts.items() if text is not None}


def write(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    weights: Callable[[Path], object],
    nbytes: int,
    ours: Mapping[str, bytes],
    force: bool,
) -> Path:
    """Write a checkpoint directory whose weights somebody else writes, whole or not at all.

    Args:
        checkpoint: what the files beside the weights are made of.
        weights: writes the weights into the directory it is given. nbytes: how many bytes they have.
        ours: content of `pruning.json` and `README.md`, by name.

    Raises:
        ValueError, OSError: as `save`.
    """
    refuse_existing(path, force, checkpoint.source)
    others = (*checkpoint.files.values(), *ours.values())
    atomic.refuse_room(path, nbytes + sum(map(len, others)))
    with quiet():
        fields = _changed_config(checkpoint)
        _refuse_misfit(checkpoint, fields)
    try:
        with quiet(), atomic.replacing(Path(path), force=force) as folder:
            weights(folder)
            _write_small_files(checkpoint, folder, fields)
            for name, content in _listing(checkpoint, ours).items():
                (folder / name).write_bytes(content)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have their own full disks
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write {os.fspath(path)!r}, nothing was left behind: {cause}") from error
    return Path(path)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the tensors in the dtypes that they are stored in, of tied ones once."""
    return sum(form.nbytes for form in stored_forms(checkpoint).values())


def refuse_full(
    path: str | os.PathLike[str], checkpoint: Checkpoint, share: float = 1.0, beside: int = 0
) -> None:
    """Refuse to begin the work for a result that the disk has no room for.

    Args:
        path: the directory that will be made; what it replaces stays until then.
        share: the result's bytes, as a share of the checkpoint's.
        beside: bytes of what is kept beside it until it is there.

    Raises:
        ValueError: says both numbers.
    """
    files = sum(map(len, checkpoint.files.values()))
    atomic.refuse_room(path, int(share * stored_bytes(checkpoint)) + files + beside)


def _listing(checkpoint: Checkpoint, ours: Mapping[str, bytes]) -> dict[str, bytes]:
    """Our files, the record with the names of files that came from the source and whose names say nothing."""
    names = unusual(checkpoint.files)
    record = parse_json(ours[RECORD], RECORD) if RECORD in ours else {}
    if RECORD not in ours or record.get("files", []) == names:
        return dict(ours)
    record = {key: value for key, value in record.items() if key != "files"} | (
        {"files": names} if names else {}
    )
    return dict(ours) | {RECORD: (json.dumps(record, indent=2) + "\n").encode()}


def stock_weights(
    checkpoint: Checkpoint, value: Callable[[str], Tensor] | None = None
) -> Callable[[Path], None]:
    """What writes the weights of a checkpoint into a directory, in the format they came in, one by one.

    Args:
        value: the tensor of a name in the dtype it is stored in, where it is not in the checkpoint's model.

    Raises:
        ValueError: it has what no stock configuration can say.
    """
    if own := Own.of(checkpoint.model):
        what = "projected states" if own.directions else "layers of different widths"
        raise ValueError(f"{checkpoint.source!r} has {what}, which no stock checkpoint can hold")
    writer = _write_bin if checkpoint.format == "state-spaces" else _write_safetensors
    return partial(writer, checkpoint, value or partial(stored_tensor, checkpoint))


def _written(name: str, tensor: Tensor) -> Tensor:
    if not finite(tensor):
        raise ValueError(f"{name} has NaN or Inf values in {tensor.dtype} and is not written")
    return tensor


def _write_safetensors(checkpoint: Checkpoint, stored: Callable[[str], Tensor], folder: Path) -> None:
    model, prefix, extra = checkpoint.model, checkpoint.prefix, checkpoint.extra
    rename = inside if is_wrapped(parse_json(checkpoint.files.get(CONFIG, b"{}"), CONFIG)) else str
    whole: dict[str, tuple[str, str]] = {}  # name in the file -> what it is a part of in memory, which part
    forms: dict[str, Form] = {}
    for name, form in stored_forms(checkpoint).items():
        shape = torch.empty(form.shape, dtype=form.dtype, device="meta")
        for part, tensor in in_files(model, name, shape).items():
            short = rename(part.removeprefix(prefix))
            whole[short], forms[short] = (name, part), Form.of(tensor)
    forms |= {name: Form.of(tensor) for name, tensor in extra.items()}
    parts: dict[str, Tensor] = {}  # of one tensor, those that are not written yet

    def value(short: str) -> Tensor:
        if short in extra:
            return extra[short]
        name, part = whole[short]
        if part not in parts:
            parts.clear()  # before the next one is made
            parts.update(in_files(model, name, stored(name)))
        return _written(part, parts.pop(part))

    write_safetensors(folder, forms, value)


def _write_bin(checkpoint: Checkpoint, stored: Callable[[str], Tensor], folder: Path) -> None:
    """The original writer keeps both names of a tied tensor, over one storage."""
    forms, extra, prefix = stored_forms(checkpoint), checkpoint.extra, checkpoint.prefix
    _, copies = untied(checkpoint.model)
    named = {name: name for name in forms} | ({} if prefix else copies)
    # that of a bare backbone, whose names lack it
    names = {state_spaces.to_original(name).removeprefix(prefix): each for name, each in named.items()}
    names |= {name: name for name in extra}
    forms |= {name: Form.of(tensor) for name, tensor in extra.items()}

    def value(name: str) -> Tensor:
        return extra[name] if name in extra else _written(name, stored(name))

    bin_file.write(folder / BIN, names, forms, value)


def _write_small_files(checkpoint: Checkpoint, folder: Path, fields: dict[str, Any] | None) -> None:
    model, files = checkpoint.model, checkpoint.files
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if fields is not None:
        in_order = checkpoint.format == "transformers"  # as stock code writes it; the original has its own
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=in_order) + "\n")
    if checkpoint.format == "transformers" and GENERATION not in files and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if not any(is_tokenizer_file(name) for name in files):
        checkpoint.tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder / "tokenizer_config.json")


def _changed_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Fields of `config.json` if it must be written anew; None while the one that came in still holds."""
    config = checkpoint.model.config
    if CONFIG not in checkpoint.files:
        if checkpoint.format == "state-spaces":
            raise ValueError(f"a state-spaces checkpoint needs the {CONFIG} it came with (Checkpoint.files)")
        dtypes = list(checkpoint.stored.values())
        most = max(dtypes, key=dtypes.count, default=torch.float32)
        named = {
            "architectures": [type(checkpoint.model).__name__],
            "dtype": str(most).removeprefix("torch."),
        }
        return json.loads(config.to_json_string()) | named
    came, original = from_json(checkpoint.files[CONFIG]), checkpoint.format == "state-spaces"
    told = parse_json(checkpoint.files[CONFIG], CONFIG)
    # Both through stock JSON: an infinite step limit is a float in one and a tagged object in the file.
    before = _all_fields(stock_config(checkpoint.source, told, original))
    now = _all_fields(config)
    if original:
        return state_spaces.updated(came, before, now)
    shared = (now.keys() & before.keys()) - _NOT_COMPARED
    if Own.of(checkpoint.model):
        shared -= {"use_cache"}  # which is off in memory only (projected.py)
    changed = {key: now[key] for key in shared if now[key] != before[key]}
    for key, older in _OLDER.items():
        if key in changed and older in came and came[older] == before[key]:
            changed[older] = changed[key]
    if "layers_block_type" in changed:  # NemotronH's older fields say the same, to readers that know no other
        if "hybrid_override_pattern" in came and "hybrid_override_pattern" not in changed:
            changed["hybrid_override_pattern"] = optional(config, "hybrid_override_pattern")
        if "num_hidden_layers" in came:
            changed["num_hidden_layers"] = len(changed["layers_block_type"])
    return with_changes(came, changed) if changed else None


def _all_fields(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _refuse_misfit(checkpoint: Checkpoint, fields: dict[str, Any] | None) -> None:
    """Refuse a directory that nobody could read: pruning changed shapes, and the config does not say so."""
    content = checkpoint.files[CONFIG] if fields is None else json.dumps(fields)
    told = parse_json(content, CONFIG)
    config = stock_config(checkpoint.source, told, checkpoint.format == "state-spaces")
    _, expected, _ = stock_model(checkpoint.source, config, Own.of(checkpoint.model))
    held, _ = untied(checkpoint.model)
    wrong = [name for name in held if name not in expected or held[name].shape != expected[name].shape]
    if wrong := wrong + [name for name in expected if name not in held]:
        raise ValueError(f"{CONFIG} cannot describe the shapes of this model: {few(wrong)}")


def _name_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a class that release 4 does not know; both know the same by its older name."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
