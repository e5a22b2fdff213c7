"""What lies beside the weights of a checkpoint: which files are carried over, and what is no checkpoint.

The rule is one of names and sizes: every ordinary file that holds no weights, is not hidden and not large
goes into the result as bytes; what does not is said. None of them is run. `reading.py` reads them,
`writing.py` asks here what a directory that it may replace can hold.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..data.foreign import decoded, from_json, read_bytes
from .container import PACKED
from .files import BIN, CONFIG, SAFETENSORS, few
from .folder import Folder

RECORD, GENERATION, CARD = "pruning.json", "generation_config.json", "README.md"
MEASURED, PAGE = "measured.json", "report.html"  # what `sparsessm report` leaves beside a result
FINGERPRINT = "fingerprint.safetensors"  # what `sparsessm watch --learn` leaves there
FINDING = "fit.json"  # how a size was found, of `sparsessm fit`
BESIDE = (MEASURED, PAGE, FINGERPRINT)  # made of a result later, and no part of it
OURS = (RECORD, CARD, FINDING, MEASURED, PAGE, FINGERPRINT)
TEMPLATES = "additional_chat_templates"
LARGE = 10 << 20
"""Bytes of the largest file that is carried over, but for the tokenizer's."""
_ALL = 64 << 20  # bytes of all files but the tokenizer's
_MANY = 500  # files

_WORDS = (  # by which a tokenizer splits a text
    "tokenizer*.json",
    "*.tiktoken",
    "*.model",
    "*.model.v*",
    "vocab.*",
    "*.vocab",
    "merges.txt",
    "*.spm",
    "*.codes",
    "tekken.json",
)
_ABOUT_WORDS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
)
_FOLDERS = {TEMPLATES: "*.jinja", "custom_generate": "*"}
"""Folders of which stock code knows, and which of their files it reads."""
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot"),
    *(
        "*.onnx",
        "*.onnx_data",
        "*.npz",
        "*.npy",
        "*.pkl",
        "*.pickle",
        "*.tflite",
        "*.mlmodel",
        "*.index.json",
    ),
)
_HEADED = {CONFIG, GENERATION, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"}
"""Files that may name code under `auto_map`."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]*(\([^)]{0,9999}\)|[^\n#;]+)", re.M)
_DEEP = 32  # folders inside each other


def is_tokenizer_file(name: str) -> bool:
    """True for a part of a tokenizer, by its name in a checkpoint directory."""
    return is_vocabulary(name) or any(fnmatch(name, pattern) for pattern in _ABOUT_WORDS)


def is_vocabulary(name: str) -> bool:
    """True for a file that a tokenizer takes its tokens from."""
    about = any(fnmatch(name, pattern) for pattern in _ABOUT_WORDS)
    return not about and any(fnmatch(name, pattern) for pattern in _WORDS)


def is_usual(name: str) -> bool:
    """True for a name that only checkpoints have: what `--force` may remove with one."""
    usual = (CONFIG, GENERATION, *OURS, "LICENSE*", "NOTICE*", PACKED, "model*.safetensors")
    usual += ("pytorch_model*.bin", "*.index.json", "processor_config.json", "preprocessor_config.json")
    return is_tokenizer_file(name) or any(fnmatch(name, pattern) for pattern in usual)


def carried(folder: Folder) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of a checkpoint directory that its result has too, by their paths in it, and what to say.

    Left out without a word: hidden files, what an earlier run said of its result (`OURS`), the weights.
    """
    files: dict[str, bytes] = {}
    left: list[str] = []
    room = _ALL
    read = {SAFETENSORS, BIN, PACKED, f"{SAFETENSORS}.index.json", f"{BIN}.index.json"}
    for name, path in _candidates(folder, left):
        if name in OURS:
            continue
        if any(fnmatch(name.lower(), pattern) for pattern in _WEIGHTS):
            if name not in read and not re.fullmatch(
                r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", name
            ):
                left.append(name)
            continue
        size = path.stat().st_size
        known = is_tokenizer_file(name) or name in _HEADED
        if not known and (size > min(LARGE, room) or len(files) >= _MANY or _leads_out(path, folder.path)):
            left.append(name)
            continue
        try:
            files[name] = _content(folder, name)
        except OSError as error:
            if known:
                raise ValueError(f"{path}: not readable ({error})") from error
            left.append(name)
            continue
        room -= 0 if known else size
    notes = []
    if left:
        what = f"not carried over into the result: {few([ascii(name)[1:-1] for name in sorted(left)])}"
        notes.append(what)
    if missing := sorted(name for name in _code_named(files) if name not in files):
        notes.append(
            f"auto_map names files that do not exist: {few([ascii(name)[1:-1] for name in missing])}"
        )
    return files, tuple(notes)


def tokenizer_files(folder: Folder) -> dict[str, bytes]:
    """The files of the tokenizer in a directory, by their paths in it."""
    names = [name for name, _ in _candidates(folder, []) if is_tokenizer_file(name)]
    return {name: _content(folder, name) for name in names}


def _content(folder: Folder, name: str) -> bytes:
    """The bytes of a file; of JSON with a byte order mark plain UTF-8, which stock code reads."""
    content = folder.content(name)
    marked = name.endswith(".json") and content.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE))
    return decoded(content).encode() if marked else content


def has_vocabulary(folder: Folder) -> bool:
    """True if a directory has a file that a tokenizer takes its tokens from."""
    return any(is_vocabulary(path.name) and path.is_file() for path in folder.entries)


def unusual(files: Mapping[str, Any]) -> list[str]:
    """Of the files carried over, those whose names say nothing: a record lists them."""
    return sorted(name for name in files if not is_usual(name))


def _candidates(folder: Folder, left: list[str]) -> Iterator[tuple[str, Path]]:
    """(path in the directory, file) of what may be carried over; `left` gets what is passed over."""
    code: list[str] = []
    others: list[Path] = []
    for path in folder.entries:
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path.name, path
            if path.name in _HEADED or path.suffix == ".py":
                code.append(path.name)
        elif path.is_dir() and (pattern := _FOLDERS.get(path.name)):
            for inner in sorted(path.glob(pattern)):
                if inner.is_file() and not inner.name.startswith("."):
                    yield f"{path.name}/{inner.name}", inner
        elif path.is_dir() and path.name == "__pycache__":
            continue
        else:
            others.append(path)
    named = _code(folder, code)
    for path in others:  # folders of which only named code is carried over, and what is no file
        inside = [name for name in named if name.startswith(f"{path.name}/")]
        if inside:
            left += sorted({f"{path.name}/{inner.name}" for inner in path.iterdir()} - {*inside})
        else:
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    for name in named:
        if name.split("/")[0] not in _FOLDERS:
            yield name, folder.path / name


def _code(folder: Folder, start: list[str]) -> list[str]:
    """Files of code in folders of the directory that files of it name: by `auto_map`, or by an import."""
    found: list[str] = []
    texts = {name: _text(folder, name) for name in start}
    asked = [*_code_named({n: text.encode() for n, text in texts.items() if n in _HEADED})]
    asked += [name for at in start if at.endswith(".py") for name in _imported(at, texts[at])]
    while asked and len(found) < _MANY:
        name = asked.pop()
        if (
            "/" not in name
            or name in found
            or not folder.has(name)
            or _leads_out(folder.path / name, folder.path)
        ):
            continue
        found.append(name)
        asked += _imported(name, _text(folder, name))
    return sorted(found)


def _imported(at: str, text: str) -> list[str]:
    """Paths of files that a file of code may import by relative names."""
    found = []
    for module, names in _IMPORT.findall(text):
        up = len(module) - len(module.lstrip("."))
        base = at.split("/")[:-1]
        if up > len(base):
            continue
        base = base[: len(base) - up]
        parts = [part for part in module.split(".") if part]
        if len(base) + len(parts) > _DEEP:
            continue
        found.append("/".join([*base, *parts]) + ".py" if parts else "")
        packages = ["/".join([*base, *parts][:depth]) for depth in range(1, len(base) + len(parts) + 1)]
        found += [f"{package}/__init__.py" for package in packages]
        plain = re.sub(r"#.*", "", names).strip("() \t\n").split(",")
        asked = (name.split(" as ")[0].strip() for name in plain)
        found += ["/".join([*base, *parts, name]) + ".py" for name in asked if name.isidentifier()]
    return [name for name in found if name]


def _code_named(files: Mapping[str, bytes]) -> set[str]:
    """Files of code beside the model that the `auto_map` of its files names."""
    found: set[str] = set()
    for name in _HEADED & files.keys():
        try:
            fields = from_json(files[name])
        except ValueError:
            continue  # whoever needs the file says so
        told = fields.get("auto_map") if isinstance(fields, dict) else None
        values = list(told.values()) if isinstance(told, dict) else [told]
        flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for one in flat:  # "repository--module.Class" is somewhere else
            if isinstance(one, str) and re.fullmatch(r"\w+(\.\w+)+", one):
                found.add(one.rpartition(".")[0].replace(".", "/") + ".py")
    return found


def _text(folder: Folder, name: str) -> str:
    """A file of code or fields; empty if it is large, or no text."""
    try:
        return folder.text(name) if (folder.path / name).stat().st_size <= LARGE else ""
    except OSError:
        return ""


def _leads_out(path: Path, folder: Path) -> bool:
    """True for a link to somewhere else; the hub's cache has links into a folder of its own."""
    real, home = path.resolve(), folder.resolve()
    cache = home.parent.parent
    return not real.is_relative_to(home) and not (
        home.parent.name == "snapshots" and real.is_relative_to(cache)
    )


# ----------------------------------------------------------------------------------- what is no checkpoint


def refuse_others(source: str, folder: Folder, *, weights: bool) -> None:
    """Refuse a directory that is no model but looks like one.

    Args:
        weights: the model is wanted, not only the files beside it.

    Raises:
        ValueError: an adapter, alone or beside a model; files of git-lfs that were not fetched.
    """
    wanted = [path for path in folder.entries if weights or path.suffix not in (".safetensors", ".bin")]
    for path in wanted:
        if is_usual(path.name):
            refuse_pointer(folder, path.name)
    if weights and any(
        path.name == "adapter_config.json" or fnmatch(path.name, "adapter_model.*") for path in wanted
    ):
        _refuse_adapter(source, folder)


def refuse_pointer(folder: Folder, name: str) -> None:
    """Refuse what git leaves in place of a large file that was not fetched.

    Raises:
        ValueError: the file is such a pointer.
    """
    path = folder.path / name
    try:
        small = path.is_file() and path.stat().st_size <= 1024
        pointer = small and folder.content(name).startswith(_POINTER)
    except OSError:
        return  # whoever needs the file says so
    if pointer:
        raise ValueError(
            f"{path}: this is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        )


def _refuse_adapter(source: str, folder: Folder) -> None:
    try:
        told = from_json(read_bytes(folder.path / "adapter_config.json"))
    except ValueError:
        told = {}
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    of = f" of {ascii(base)[:200]}" if isinstance(base, str) and base else ""
    merge = "merge it into its base model first (in PEFT: merge_and_unload, then save_pretrained)"
    weights = (SAFETENSORS, BIN, f"{SAFETENSORS}.index.json", f"{BIN}.index.json", PACKED)
    if any((folder.path / name).exists() for name in weights):
        raise ValueError(
            f"{source!r} holds an adapter (PEFT){of} beside a model, and the model would be used without "
            f"it; {merge}, or move the files adapter_* away to use the model alone"
        )
    raise ValueError(f"{source!r} is an adapter (PEFT){of}, not a model; {merge}")
