"""Text -> token windows, for calibration (stage 1) and for perplexity.

Where the text comes from: the CPython standard library of the running interpreter (`stdlib`, no download),
three standard corpora through the `datasets` package (an extra), or local files (`text_files.py`). Nothing
here knows about models.

The `stdlib` rule: a module is held out when the SHA-256 of its dotted name says so (about one in ten). The
name and not the text decides, so a module stays on its side in every Python version; `builtin:pycode` was
trained on the other side.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from .text_files import FILE_TYPES, PACKED, columns, file_type, is_local, read_texts

Split = Literal["calibration", "evaluation"]
FILES = f"a file ({', '.join(FILE_TYPES)}; also {PACKED}), or a directory of such files"

# Directories that are not read: what pip installs, machine-generated tables, and lib2to3, whose own
# copies of `tokenize` and `token` would leak across the split.
_SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
        "lib-dynload",
        "encodings",
        "pydoc_data",
        "lib2to3",
    }
)
_TESTS = frozenset({"test", "tests", "idle_test"})  # distributions drop them
_GENERATED = ("_sysconfigdata", "config-")


class Tokenizer(Protocol):
    """The part of `transformers.PreTrainedTokenizerBase` used here, beside `is_fast` and `eos_token_id`."""

    def __call__(self, text: list[str], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Dataset:
    """One named text: a row of `DATASETS`.

    Attributes:
        name: what the user types.
        summary: one line for `sparsessm list`.
        calibration: the name of the split that calibration draws from.
        evaluation: the name of the split that perplexity is measured on.
        source: arguments of `datasets.load_dataset` (path, then configuration); empty for `stdlib`.
        field: the column that holds the text.
        joiner: rows are joined by this into one document (the protocol of the field's perplexity tables);
            None keeps every row a document of its own.
        limit: at most so many rows are read.
        revision: of the hub's repository; None for its main branch.
        files: per split, the one file to read of a large corpus.
    """

    name: str
    summary: str
    calibration: str
    evaluation: str
    source: tuple[str, ...] = ()
    field: str = "text"
    joiner: str | None = None
    limit: int | None = None
    revision: str | None = None
    files: tuple[tuple[str, str], ...] = ()


DATASETS: dict[str, Dataset] = {
    row.name: row
    for row in (
        Dataset("stdlib", "the running Python's standard library, split by module name; no download",
                calibration="train", evaluation="held-out"),
        Dataset("wikitext2", "WikiText-2 raw (needs the `data` extra and a network)",
                calibration="train", evaluation="test",
                source=("Salesforce/wikitext", "wikitext-2-raw-v1"), joiner="\n\n"),
        Dataset("c4", "C4 English, first shard (needs the `data` extra and a network)",
                calibration="train", evaluation="validation", source=("allenai/c4",), joiner=" ", limit=1100,
                files=(("train", "en/c4-train.00000-of-01024.json.gz"),
                       ("validation", "en/c4-validation.00000-of-00008.json.gz"))),
        Dataset("ptb", "Penn Treebank sentences (needs the `data` extra and a network)",
                calibration="train", evaluation="test",
                source=("ptb-text-only/ptb_text_only",), field="sentence", joiner=" ",
                # the main branch is a loading script, which `datasets` 4 no longer runs
                revision="refs/convert/parquet",
                files=(("train", "penn_treebank/train/0000.parquet"),
                       ("test", "penn_treebank/test/0000.parquet"))),
    )
}  # fmt: skip


def documents(data: str, split: Split, column: str | None = None) -> list[str]:
    """Returns the texts of one split.

    Args:
        data: a name in `DATASETS`, or the path of a .txt, .jsonl, .json or .parquet file (all but .parquet
            also as .gz), or of a directory: of all such files below it, in the order of their names.
        split: "calibration" or "evaluation". Local files have no splits: both uses read the same text, so
            calibrate and evaluate on different files where that matters.
        column: the field or column that holds the text; None: `text`, of a named data set its own.

    Raises:
        ValueError: unknown name, missing or unreadable file, no text in it, a column that is not there (those
            that are, are listed) or has no effect, or the `datasets`/`pyarrow` package needed for it is not
            installed.
    """
    if split not in ("calibration", "evaluation"):
        raise ValueError(f"unknown split {split!r}; known: calibration, evaluation")
    refuse_idle_column(data, column)
    row = DATASETS.get(data)
    if row is None and not is_local(data):
        near = get_close_matches(data, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data {data!r}; known: {', '.join(DATASETS)}, or {FILES}{hint}")
    if row is None:
        texts = read_texts(data, column)
    elif not row.source:
        texts = [text for _, text in stdlib_modules(held_out=split == "evaluation")]
    else:
        texts = _download(row, row.evaluation if split == "evaluation" else row.calibration, column)
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"data {data!r}: no text in the {split} split")
    return texts


def refuse_idle_column(data: str, column: str | None) -> None:
    """Refuse a column where the text is in none.

    Raises:
        ValueError: `stdlib` or a .txt file.
    """
    row = DATASETS.get(data)
    if column is not None and (file_type(data) == ".txt" if row is None else not row.source):
        raise ValueError(f"column is {column!r}; it has no effect with data {data!r}")


def calibration_windows(
    data: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    split: Split = "calibration",
    distinct: bool = False,
    column: str | None = None,
) -> Tensor:
    """Draws unpadded token windows with a seeded generator.

    The documents are packed into one stream (an end-of-text token between two), which is cut into a grid of
    windows after a random offset; `samples` different cells are drawn: the first of them are the same however
    many are drawn. A text with fewer cells gives windows at random, possibly overlapping, places.

    Args:
        data: see `documents`.
        tokenizer: a transformers tokenizer.
        samples: number of windows.
        length: tokens in a window.
        seed: of the generator that draws them.
        split: the text's side.
        distinct: rather fewer windows than overlapping ones.
        column: see `documents`.

    Returns:
        (samples, length) int64.

    Raises:
        ValueError: `samples` or `length` below 1, or a text shorter than one window; else as `documents`.
    """
    if samples < 1 or length < 1:
        raise ValueError(
            f"calibration needs samples >= 1 and length >= 1, got samples={samples}, length={length}"
        )
    stream, _ = _stream(documents(data, split, column), tokenizer, sized=False)
    spare = stream.numel() - length
    if spare < 0:
        raise ValueError(_too_short(data, stream.numel(), length))
    random = torch.Generator().manual_seed(seed)
    # the grid keeps at least one whole window behind its offset
    offset = int(torch.randint(min(length, spare + 1), (1,), generator=random))
    cells = (stream.numel() - offset) // length
    if distinct:
        samples = min(samples, cells)
    if cells >= samples:
        starts = offset + length * torch.randperm(cells, generator=random)[:samples]
    else:
        starts = torch.randint(spare + 1, (samples,), generator=random)
    return stream[starts[:, None] + torch.arange(length)]  # (samples, length)


def evaluation_windows(
    data: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    limit: int | None = None,
    split: Split = "evaluation",
    column: str | None = None,
) -> tuple[Tensor, int]:
    """Cuts a text into consecutive non-overlapping windows, as the perplexity tables of the field do.

    Args:
        data: see `documents`.
        tokenizer: a transformers tokenizer.
        length: tokens in a window; the rest of the text shorter than a window is dropped.
        limit: at most so many windows, evenly spaced over the text (its beginning alone would be a biased
            sample: `stdlib` is in alphabetical order).
        split: the text's side.
        column: see `documents`.

    Returns:
        The windows, (W, length) int64, and the number of UTF-8 bytes of the text of the predicted tokens,
        that is of all but the first of each window. A character that is split over tokens counts with its
        first token, white space that a tokenizer drops counts with the token after it, and an end-of-text
        token has no bytes. A slow tokenizer gives no offsets; then it is the text's bytes times the share of
        its tokens predicted.

    Raises:
        ValueError: `length` below 2 or `limit` below 1, or a text shorter than one window; else as
            `documents`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"evaluation needs limit >= 1 or None, got {limit}")

    def spread(windows: Tensor) -> list[Tensor]:
        all_of = torch.arange(count := len(windows))
        return [torch.linspace(0, count - 1, limit).round().long() if limit and limit < count else all_of]

    (found,) = evaluation_parts(data, tokenizer, spread, length=length, split=split, column=column)
    return found


def evaluation_parts(
    data: str,
    tokenizer: Tokenizer,
    parts: Callable[[Tensor], Sequence[Tensor]],
    *,
    length: int,
    split: Split = "evaluation",
    column: str | None = None,
) -> list[tuple[Tensor, int]]:
    """The same in several parts: of all windows (W, length) `parts` gives the numbers of those in each.

    Raises:
        ValueError: as `evaluation_windows`.
    """
    if length < 2:
        raise ValueError(
            f"evaluation needs length >= 2 (the first token of a window is not predicted), got {length}"
        )
    stream, sizes = _stream(documents(data, split, column), tokenizer, sized=True)
    if (count := stream.numel() // length) == 0:
        raise ValueError(_too_short(data, stream.numel(), length))
    windows = stream[: count * length].view(count, length)
    predicted = sizes[: count * length].view(count, length)[:, 1:]
    return [(windows[part], round(float(predicted[part].sum()))) for part in parts(windows)]


def fingerprint(tokens: Tensor) -> str:
    """Returns the SHA-256 (hexadecimal) of the tokens as little-endian int64, row by row."""
    array = tokens.detach().to("cpu", torch.int64).contiguous().numpy()
    return hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()


def stdlib_modules(*, held_out: bool | None, tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, source) of the standard library's modules in the order of their names.

    Left out: installed packages, generated and table-like modules, and the few sources that are not UTF-8.

    Args:
        held_out: True for the evaluation side, False for the training side, None for both.
        tests: yield the modules inside test directories instead (extra training text, where a Python carries
            it).

    Raises:
        ValueError: the standard library is not a directory of .py files (a zipped Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise ValueError(
            "data 'stdlib': the standard library of this Python is not in a directory; use a local file"
        )
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(_GENERATED)]
        for file in files:
            parts = (Path(folder) / file).relative_to(root).parts
            if not file.endswith(".py") or file.startswith(_GENERATED) or _TESTS.isdisjoint(parts) is tests:
                continue
            name = module_name(parts)
            if held_out is None or is_held_out(name) is held_out:
                found.append((name, Path(folder) / file))
    for name, path in sorted(found):
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def module_name(parts: tuple[str, ...]) -> str:
    """Returns ("email", "__init__.py") as "email": the same name whether the module is a file or a folder."""
    names = [*parts[:-1], parts[-1].removesuffix(".py")]
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


def is_held_out(name: str) -> bool:
    """Says whether a module of this dotted name belongs to the evaluation side (one name in ten)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10 == 0


def _stream(texts: list[str], tokenizer: Tokenizer, *, sized: bool) -> tuple[Tensor, Tensor]:
    """Packs documents: (tokens (T,) int64, the UTF-8 bytes of each token (T,) float64 if `sized`)."""
    end = getattr(tokenizer, "eos_token_id", None)  # the stock class makes its attributes on the fly
    fast = sized and getattr(tokenizer, "is_fast", False)
    tokens: list[int] = []
    sizes: list[float] = []
    for first in range(0, len(texts), 64):  # batches: the offsets of a whole corpus would not fit in memory
        batch = texts[first : first + 64]
        try:
            encoded = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        except BaseException as error:  # native code stops with one beside all others, without a public name
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer cannot split the text: {str(error)[:300]!r}") from error
        for number, text in enumerate(batch):
            ids = encoded["input_ids"][number]
            between = [end] if tokens and end is not None else []
            tokens.extend(between + ids)
            if not sized:
                continue
            sizes.extend([0] * len(between))
            if fast:
                sizes.extend(_byte_sizes(text, encoded["offset_mapping"][number]))
            else:
                sizes.extend([len(text.encode()) / max(len(ids), 1)] * len(ids))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(sizes, dtype=torch.float64)


def _byte_sizes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Gives each token the bytes from the end of the token before it to its own end."""
    sizes, done = [], 0
    for _, end in offsets:
        sizes.append(len(text[done:end].encode()))
        done = max(done, end)
    return sizes


def _download(row: Dataset, split: str, column: str | None = None) -> list[str]:
    """Reads one split of a named corpus through the `datasets` package."""
    name = column or row.field
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"data {row.name!r} needs the datasets package; install sparsessm[data], "
            "or use stdlib or a local file"
        ) from error
    options: dict[str, Any] = {"split": split, "revision": row.revision, "streaming": row.limit is not None}
    if row.files:
        options["data_files"] = {split: dict(row.files)[split]}
    try:
        # streamed if only the first rows are wanted
        rows = cast("Iterable[dict[str, str]]", datasets.load_dataset(*row.source, **options))
        texts, others = [], []
        for item in islice(rows, row.limit):
            if not isinstance(item.get(name), str):
                others = list(item)
                break
            texts.append(item[name])
    except Exception as error:  # the package raises dozens of kinds; all mean that the text cannot be had
        raise ValueError(
            f"data {row.name!r} ({row.source[0]}, {split}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if others:
        raise ValueError(f"data {row.name!r}: no text in column {name!r}; {columns(others)}")
    return texts if row.joiner is None else [row.joiner.join(texts)]


def _too_short(data: str, tokens: int, length: int) -> str:
    return (
        f"data {data!r}: its text has {tokens} tokens, fewer than a window of {length}; use a shorter length"
    )
