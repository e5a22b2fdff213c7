"""The command that serves a model: serve.

Place in the flow: parses and prints; the work is in `serving/`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from .answering import RUN, Kept, Quiet, Tokenizer, answering, app, argument, option, tell

KEY = "SPARSESSM_API_KEY"


@app.command(rich_help_panel=RUN)
def serve(
    model: Annotated[str, argument(metavar="MODEL", help="A packed directory, or any model.")],
    host: Annotated[str, option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("--port", min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, option("--name", help="What clients call the model [default: its last part].")
    ] = None,
    batch: Annotated[int, option("--batch", min=1, max=256, help="Answer so many requests at once.")] = 16,
    waiting: Annotated[int, option("--queue", min=0, help="Let so many more wait; refuse the rest.")] = 256,
    cache: Annotated[
        str, option("--cache", metavar="SIZE", help="Keep states of prompts, for prompts that begin alike.")
    ] = "1GB",
    new_tokens: Annotated[int, option("--max-tokens", min=1, help="The longest answer.")] = 4096,
    prompt_tokens: Annotated[int, option("--max-prompt", min=1, help="The longest prompt.")] = 32768,
    seconds: Annotated[
        float, option("--timeout", min=0.1, help="Seconds that a request may take, waiting included.")
    ] = 600.0,
    watch: Annotated[
        bool, option("--watch", help="Compare the prompts with the fingerprint of `sparsessm watch --learn`.")
    ] = False,
    threads: Annotated[int | None, option(help="Number of threads [default: as many as torch uses].")] = None,
    keys: Kept = "float32",
    tokenizer: Tokenizer = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model on the CPU, with the OpenAI API.

    Clients send the key of the environment variable SPARSESSM_API_KEY, if there is one.
    """
    with answering(quiet, nothing="the server has ended") as progress:
        from ..data.foreign import bytes_of
        from ..runtime import load
        from ..serving import running
        from ..serving.settings import Settings

        running.refuse_without_libraries()
        key = os.environ.get(KEY)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError(f"{KEY} is not a key; allowed: printable ASCII, no spaces around it")
        settings = Settings(
            name=name or Path(model).name or model,
            host=host,
            port=port,
            key=key,
            batch=batch,
            waiting=waiting,
            cache=bytes_of(cache, "--cache"),
            new_tokens=new_tokens,
            prompt_tokens=prompt_tokens,
            seconds=seconds,
        )
        if watch and keys != "float32":
            raise ValueError(f"--watch compares states of --keys float32; given: {keys}")
        if not settings.local and key is None:
            progress.note(f"note: {host} can be reached from other machines, and no {KEY} is set")
        with running.bound(host, port) as listening:
            progress.say(f"loading {model}")
            loaded = load(model, tokenizer=tokenizer, threads=threads, keys=keys)
            tell(loaded.notes, progress)
            monitor = None
            if watch:
                from ..serving.watching import Monitor
                from ..studies import traffic

                found = traffic.load(Path(model) / traffic.FILE, loaded)
                monitor = Monitor(loaded, found, progress.note)
            server = running.Server(loaded, settings, listening, monitor)
            progress.say(f"serving {settings.name}")
            progress.note(f"{settings.name} is served at {server.address}/v1; Ctrl-C ends it")
            server.run()
