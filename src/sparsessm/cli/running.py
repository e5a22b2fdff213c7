"""Commands that run a model, or write it for running: generate, export, pack, unpack.

Place in the flow: parses, streams and prints; the work is in `runtime/` and `checkpoint/`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

from ..report.record import kind_of, percent
from . import tables
from .answering import (
    RUN,
    SMALLER,
    Force,
    Json,
    Kept,
    Quiet,
    Tokenizer,
    answering,
    app,
    argument,
    option,
    print_json,
    tell,
)
from .progress import to_stderr

_BLOCK = re.compile(r"blk\.\d+\.")
Generating = Annotated[
    bool, option("--quiet", "-q", help="Print nothing but the text (or the JSON) and errors.")
]


@app.command(rich_help_panel=RUN)
def generate(
    model: Annotated[str, argument(metavar="MODEL", help="A packed directory, or any model.")],
    prompt: Annotated[
        str, argument(metavar="PROMPT", help="The text to continue, or - to read it from stdin.")
    ],
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", "-n", min=0, help="Generate at most so many tokens.")
    ] = 128,
    temperature: Annotated[
        float,
        option(help="Randomness: divides the logits; 0 always takes the most probable token."),
    ] = 0.0,
    top_k: Annotated[int | None, option(help="Draw from this many of the most probable tokens.")] = None,
    top_p: Annotated[
        float | None, option(help="Draw from the most probable tokens that together have this probability.")
    ] = None,
    seed: Annotated[int, option(help="Seed of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, option(help="Stop before this text; may be given several times.")
    ] = None,
    threads: Annotated[int | None, option(help="Number of threads [default: as many as torch uses].")] = None,
    keys: Kept = "float32",
    tokenizer: Tokenizer = None,
    as_json: Json = False,
    quiet: Generating = False,
) -> None:
    """Continue a text on the CPU. The text streams to stdout; the speed is printed on stderr."""
    with answering(quiet, streaming=True, nothing="the text ends here", events=as_json):
        from ..runtime import load

        text = _standard_input() if prompt == "-" else prompt
        ready = load(model, tokenizer=tokenizer, threads=threads, keys=keys)
        # the command's own is silent while it streams
        tell(ready.notes, to_stderr(quiet=quiet, events=as_json))

        def show(piece: str) -> None:
            if not as_json:
                tables.echo(piece, end="")

        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        done = ready.generate(text, max_new_tokens, stop=stop or (), on_token=show, **options)
        if as_json:
            print_json(
                {
                    "model": model,
                    "text": done.text,
                    "ids": done.ids,
                    "finish": done.finish,
                    "prompt_tokens": len(done.prompt_ids),
                    "new_tokens": len(done.ids),
                    "seconds": done.seconds._asdict(),
                }
            )
        else:
            tables.echo("")
        if not quiet:
            steps = max(len(done.ids) - 1, 0)  # the first token is chosen from what the prompt gave
            tables.echo(
                f"prompt: {_speed(len(done.prompt_ids), len(done.prompt_ids), done.seconds.prompt)}; "
                f"continuation: {_speed(len(done.ids), steps, done.seconds.decode)}; ended by {done.finish}",
                err=True,
            )


def _standard_input() -> str:
    """All of stdin.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None


def _speed(tokens: int, steps: int, seconds: float) -> str:
    rate = f", {steps / seconds:.1f} tokens/s" if steps and seconds > 0 else ""
    return f"{tokens} {'token' if tokens == 1 else 'tokens'}{rate}"


@app.command(rich_help_panel=RUN)
def export(
    model: Annotated[str, argument(metavar="MODEL", help="A result of `prune` or `pack`, or any model.")],
    gguf: Annotated[Path, option("--gguf", help="The file to write.")],
    kind: Annotated[
        str | None,
        option(
            "--type",
            help="Store the large matrices as bf16, f16, f32, q8_0 or q4_0 [default: the model's dtype].",
        ),
    ] = None,
    head: Annotated[
        str | None,
        option("--head", help="Another type for embedding and head [default: that of the others]."),
    ] = None,
    tokenizer: Tokenizer = None,
    force: Annotated[
        bool, option("--force", help="Replace an existing GGUF file.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as a GGUF file, for llama.cpp, Ollama and LM Studio."""
    with answering(quiet, gguf, events=as_json) as progress:
        from ..checkpoint import export as exporting

        progress.say(f"exporting {model}")
        done = exporting(model, gguf, type=kind, head=head, force=force, tokenizer=tokenizer)
        tell(done.notes, progress)
    rows: dict[str, dict[str, Any]] = {}
    for name, (stored, nbytes) in done.tensors.items():
        row = rows.setdefault(_BLOCK.sub("", name), {"type": stored, "count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += nbytes
    if as_json:
        print_json(
            {"model": model, "out": str(gguf), "type": done.kind, "bytes": done.nbytes, "tensors": rows}
        )
    elif not quiet:
        found = sorted(rows.items(), key=lambda item: -item[1]["bytes"])
        cells = [[name, row["type"], f"{row['count']:,}", f"{row['bytes']:,}"] for name, row in found]
        cells.append(["the file", done.kind, f"{len(done.tensors):,}", f"{done.nbytes:,}"])
        columns = ["tensors", "type", "number", "bytes"]
        tables.show(tables.table(f"{model}, as GGUF", columns, cells, left=2), f"Saved to {gguf}.")


@app.command(rich_help_panel=SMALLER)
def pack(
    model: Annotated[str, argument(metavar="MODEL", help="A result of `prune`, or any model.")],
    out: Annotated[Path, option("--out", "-o", help="The directory to write.")],
    dtype: Annotated[
        str | None,
        option(help="Store the large matrices as fp32, bf16 or int8 [default: unchanged, lossless]."),
    ] = None,
    head: Annotated[str | None, option(help="int8: store the embedding and the head as int8, too.")] = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store a pruned model without its zeros: smaller, and faster in our runtime."""
    with answering(quiet, out, events=as_json) as progress:
        from ..checkpoint import pack as packing

        progress.say(f"packing {model}")
        done = packing(model, out, dtype=dtype, head=head, force=force, tokenizer=tokenizer)
        tell(done.notes, progress)
    kinds: dict[str, list[Any]] = {}
    for name, (label, values) in done.outline.forms.items():
        kind = kinds.setdefault(kind_of(name), [0, 0, set()])
        kind[0] += done.sizes[name]
        kind[1] += done.outline.sizes[name]
        kind[2].add(f"{label} {values}")
    found = sorted(kinds.items(), key=lambda item: -item[1][0])
    if as_json:
        rows = {
            kind: {"before": before, "after": after, "forms": sorted(forms)}
            for kind, (before, after, forms) in found
        }
        sizes = {"before": done.before, "after": done.after, "ratio": done.ratio}
        print_json({"model": model, "out": str(out), "bytes": sizes, "tensors": rows})
    elif not quiet:
        cells = [
            [kind, ", ".join(sorted(forms)), f"{before:,}", f"{after:,}", percent(after / before)]
            for kind, (before, after, forms) in found
        ]
        cells.append(["the file", "", f"{done.before:,}", f"{done.after:,}", percent(done.ratio)])
        columns = ["tensors", "stored as", "bytes before", "after", "share"]
        tables.show(tables.table(f"{model}, packed", columns, cells, left=2), f"Saved to {out}.")


@app.command(rich_help_panel=SMALLER)
def unpack(
    model: Annotated[str, argument(metavar="MODEL", help="A result of `pack`.")],
    out: Annotated[Path, option("--out", "-o", help="The directory to write.")],
    tokenizer: Tokenizer = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a packed directory back into the checkpoint that it was made from."""
    with answering(quiet, out, events=as_json) as progress:
        from ..checkpoint import unpack as unpacking

        progress.say(f"unpacking {model}")
        if rounded := unpacking(model, out, force=force, tokenizer=tokenizer):
            progress.note(f"note: {rounded}; `sparsessm eval` measures what it costs")
    if as_json:
        print_json({"model": model, "out": str(out), "rounded": rounded or None})
    elif not quiet:
        tables.show(f"Saved to {out}: a stock checkpoint.")
