"""The command that brings a result to the hub: upload.

Place in the flow: parses and prints; `checkpoint/uploading.py` does the work.
"""

from __future__ import annotations

from typing import Annotated

from . import tables
from .answering import RUN, Json, Quiet, answering, app, argument, option, print_json


@app.command(rich_help_panel=RUN)
def upload(
    directory: Annotated[str, argument(metavar="OUT", help="A result of `prune`, `fit` or `pack`.")],
    to: Annotated[str, argument(metavar="OWNER/NAME", help="The repository on the hub, made if needed.")],
    public: Annotated[bool, option("--public", help="Anybody may read it [default: private].")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a result to the Hugging Face hub: weights, tokenizer, record, card and report, in one commit."""
    with answering(quiet, nothing=f"look at {to}: the commit may have arrived", events=as_json) as progress:
        from ..checkpoint.uploading import upload as uploading

        progress.say(f"uploading {directory} to {to}")
        done = uploading(directory, to, public=public)
    if as_json:
        print_json({"out": directory, "to": to, **vars(done)})
    elif not quiet:
        cells = [[name, f"{size:,}"] for name, size in done.files.items()]
        cells += [[name, "removed"] for name in done.removed]
        who = "private" if done.private else "public"
        tables.show(tables.table(f"{to} ({who})", ["file", "bytes"], cells), done.url)
