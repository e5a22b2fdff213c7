"""Read a tokenizer from the files of a checkpoint, and from nothing else.

Stock code takes the class, files and code that the fields of those files name. Here it sees a directory of
links to the tokenizer's own files, with fields that are known (`known_fields.py` has the same rule for
models); `reading.py` says which directory is meant.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from ..data.foreign import first_line
from .companions import TEMPLATES, has_vocabulary, is_tokenizer_file, is_vocabulary
from .files import CONFIG
from .folder import Folder
from .known_fields import LAYERS, SIZE, optional

CONFIGURATION = "tokenizer_config.json"
NO_LIMIT = 1_000_000
"""A `model_max_length` of at least so many tokens is none: transformers says "no limit" by a huge number."""
_PANIC = "PanicException"  # what the tokenizers' native code raises; it has no public name
_ONE_AT_A_TIME = threading.Lock()
_MAPS = ("special_tokens_map.json", "added_tokens.json")
_KNOWN = set(
    "model_max_length padding_side truncation_side chat_template clean_up_tokenization_spaces "
    "add_prefix_space add_bos_token add_eos_token additional_special_tokens extra_special_tokens "
    "added_tokens_decoder model_input_names split_special_tokens spaces_between_special_tokens "
    "do_lower_case strip_accents tokenize_chinese_chars legacy errors extra_ids use_default_system_prompt "
    "trim_offsets bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
)
_ADDED = {"content", "lstrip", "rstrip", "normalized", "single_word", "special"}
_NEVER = re.compile(
    r".*(_file|_files|_path|_kwargs|_object|_class|_type|_map)|_.*|self|args|kwargs|vocab|merges|init_.*"
)


def read(source: Folder) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory.

    Raises:
        ValueError: none is there, or its files cannot be read.
    """
    try:
        with _staged(source) as folder, _panics_hushed():
            options = {"local_files_only": True, "trust_remote_code": False}
            return _tried(transformers.AutoTokenizer.from_pretrained(folder, **options))
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {str(source.path)!r} cannot be read: {first_line(error)}"
        ) from error
    except BaseException as error:
        _refuse_panic(error, f"the tokenizer in {str(source.path)!r} cannot be read")
        raise


def read_file(file: str, config: transformers.PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a lone `tokenizer.json`, which does not say which tokens begin and end a text.

    Args:
        config: of the model, which does.
    """
    try:
        with _panics_hushed():
            tokenizer = _tried(transformers.PreTrainedTokenizerFast(tokenizer_file=file))
    except Exception as error:
        raise ValueError(f"{file}: not a tokenizer.json ({first_line(error)})") from error
    except BaseException as error:
        _refuse_panic(error, f"{file}: not a tokenizer.json")
        raise
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for role in ("bos", "eos"):
        index = optional(config, f"{role}_token_id")
        if isinstance(index, int) and index in special:
            setattr(tokenizer, f"{role}_token", special[index])
    return tokenizer


def encode(tokenizer: Any, text: str, **options: Any) -> Any:
    """What a tokenizer makes of a text: its call, with errors that can be read.

    Raises:
        ValueError: its library failed on the text, or stopped.
    """
    with splitting():
        return tokenizer(text, verbose=False, **options)


@contextmanager
def splitting() -> Iterator[None]:
    """Say in one line what goes wrong while a tokenizer splits a text.

    Raises:
        ValueError: its library failed on the text, or stopped.
    """
    try:
        yield
    except BaseException as error:
        _refuse_panic(error, "the tokenizer cannot split the text")
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"the tokenizer cannot split the text: {first_line(error)}") from error


def present(folder: Folder) -> bool:
    """True if a directory has a tokenizer: a file of its tokens, or a class that needs none."""
    if has_vocabulary(folder):
        return True
    stock = _stock_class(folder.json_if_any(CONFIGURATION).get("tokenizer_class"))
    return stock is not None and not stock.vocab_files_names


def size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than its largest token."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def notes(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[str, ...]:
    """What its user should know of a tokenizer beside an embedding of so many rows."""
    if (tokens := size(tokenizer)) <= rows:
        return ()
    return (
        f"the tokenizer has {tokens} tokens, the embedding {rows} rows; a text that uses one of the others "
        "is refused",
    )


def trained_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text in tokens that a tokenizer says its model was trained on, None if it says none."""
    return _length(tokenizer.model_max_length)


def _length(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < NO_LIMIT:
        return None
    return int(value)


@contextmanager
def _staged(source: Folder) -> Iterator[Path]:
    """A directory of the tokenizer's files, with the fields of the JSON files that are known."""
    with tempfile.TemporaryDirectory(prefix="sparsessm-tokenizer-") as name:
        folder = Path(name)
        for path in source.entries:
            templates = path.is_dir() and path.name == TEMPLATES
            if templates or path.is_file() and is_tokenizer_file(path.name):
                (folder / path.name).symlink_to(path.resolve())
        fields, told = source.json_if_any(CONFIGURATION), source.json_if_any(CONFIG)
        model = {
            key: told[key] for key in ("model_type",) if str(told.get(key)) in transformers.CONFIG_MAPPING
        }
        _write(folder / CONFIG, model)
        asked = fields.get("tokenizer_class") or told.get("tokenizer_class")
        stock = _stock_class(asked)
        known = _fields(fields, stock)
        if stock is not None:
            known["tokenizer_class"] = asked
        elif asked and source.has("tokenizer.json"):  # a class of its own code, or none at all
            known["tokenizer_class"] = "PreTrainedTokenizerFast"
        elif "auto_map" in fields and not any(is_vocabulary(path.name) for path in folder.iterdir()):
            raise ValueError("it needs its own code (auto_map), which is not run")
        _write(folder / CONFIGURATION, known)
        for name in _MAPS:
            if source.has(name):
                found = source.json(name)
                _write(folder / name, _bare(_fields(found, stock)) if name == _MAPS[0] else _ids(found))
        yield folder


def _write(file: Path, fields: Mapping[str, Any]) -> None:
    file.unlink(missing_ok=True)  # the link, not what it leads to
    file.write_text(json.dumps(fields), encoding="utf-8")


def _stock_class(name: Any) -> type[PreTrainedTokenizerBase] | None:
    """The tokenizer class of transformers of this name, None if there is none."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w{0,99}", name, re.ASCII):
        return None
    if name in ("TokenizersBackend", "PythonBackend"):  # what release 5 calls these
        name = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}[name]
    if "Token" not in name:
        return None
    try:
        found = optional(transformers, name)
    except Exception:  # a part of transformers that cannot be imported here
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase) else None


def _fields(fields: Mapping[str, Any], stock: type[PreTrainedTokenizerBase] | None) -> dict[str, Any]:
    """The fields of a tokenizer's JSON file that stock code is given."""
    own = set(inspect.signature(stock.__init__).parameters) if stock is not None else set()
    known = _KNOWN | {name for name in own if not _NEVER.fullmatch(name)}
    kept = {}
    for name, value in fields.items():
        token = name.endswith("_token") and isinstance(value, str | dict)
        if name in known or token and not name.startswith("_"):
            kept[name] = value
    if not isinstance(decoder := kept.get("added_tokens_decoder", {}), dict):
        raise ValueError(f"added_tokens_decoder is a {type(decoder).__name__}, expected an object")
    for index in decoder:
        if not re.fullmatch(r"\d{1,9}", index, re.ASCII) or int(index) >= SIZE:
            raise ValueError(
                f"added_tokens_decoder has a token {ascii(index)[:80]}; allowed: 0 to {SIZE - 1}"
            )
    if type(kept.get("extra_ids")) is int and kept["extra_ids"] > LAYERS:
        raise ValueError(f"extra_ids is {kept['extra_ids']}; allowed: at most {LAYERS}")
    if (length := _length(kept.pop("model_max_length", None))) is not None:
        kept["model_max_length"] = length
    return {name: value for name, value in kept.items() if not _endless(value)}


def _bare(value: Any) -> Any:
    """The same without what a token's object does not have, and is told of on the terminal."""
    if isinstance(value, dict):
        token = "content" in value
        return {name: _bare(inner) for name, inner in value.items() if not token or name in _ADDED}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value


def _ids(found: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, value in found.items() if type(value) is int and 0 <= value < SIZE}


def _endless(value: Any) -> bool:
    """A number that would be counted up to (`extra_ids`), or is none."""
    return isinstance(value, int | float) and (not math.isfinite(value) or abs(value) > NO_LIMIT)


def _tried(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, after it has met a text: some files are only found to be broken then."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"a {type(tokenizer).__name__} is not a tokenizer")
    for text in ("", "a b\n", "\u00e9\u4e00 \U0001f600\t12"):
        with suppress(Exception):  # a vocabulary of other characters
            tokenizer(text, verbose=False)
    return tokenizer


@contextmanager
def _panics_hushed() -> Iterator[None]:
    """Keep what native code prints when it stops, past Python, off stderr; all else appears there."""
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as kept:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        panic = False
        try:
            os.dup2(kept.fileno(), 2)
            yield
        except BaseException as error:
            panic = type(error).__name__ == _PANIC
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            if not panic and (said := kept.read()):
                with suppress(OSError):
                    os.write(2, said)


def _refuse_panic(error: BaseException, what: str) -> None:
    """Say what the tokenizers' native code raises beside all exceptions."""
    if type(error).__name__ == _PANIC:
        raise ValueError(f"{what}: the library of tokenizers failed ({first_line(error)})") from error
