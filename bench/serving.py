"""What the server gives: tokens per second in batches, a cached prefix, a crowd that misbehaves, peers.

    python bench/serving.py --model DIR [--minutes 10] [--peer "NAME=COMMAND with {port}"] [--json FILE]

DIR is what `sparsessm serve` takes. Parts, in this order:

  batch    16 clients (`--batches`) that stream 128 tokens each, against the engine's own steps of 16 in
           another process, in turn, medians, also of the share of each round; beside them whatever `--peer`
           starts (a command that serves the same API).
  prefix   a prompt of 2,000 tokens and one more, read for the first time and again behind its kept state.
  crowd    64 clients for some minutes: streams, whole answers, connections cut at random, readers that take a
           few bytes at a time, bodies that are no requests. Counts each kind of answer; an error that is not
           the client's own ends the program with 1. Memory of the server over time.

Everything runs on one machine: the clients take part of the cores that the server has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsessm.report import machine

HOST = "127.0.0.1"
NEW = 128
PREFIX = 2000
SERVE = [sys.executable, "-m", "sparsessm", "serve"]
STEPS = """
import json, sys, time, torch
from sparsessm import runtime
model = runtime.load(sys.argv[1])
for line in sys.stdin:
    size, steps = map(int, line.split())
    state, tokens = model.engine.new_state(size), torch.arange(size)
    model.engine.step(tokens, state)
    begun = time.perf_counter()
    for _ in range(steps):
        model.engine.step(tokens, state)
    print(json.dumps(size * steps / (time.perf_counter() - begun)), flush=True)
"""


async def request(port: int, body: bytes, path: str = "/v1/completions") -> tuple[Any, Any]:
    """A connection on which a request was sent."""
    reader, writer = await asyncio.open_connection(HOST, port)
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def status_of(reader: Any) -> int:
    """Of an answer, whose headers are read over."""
    words = (await reader.readline()).split()
    while (await reader.readline()).strip():
        pass
    return int(words[1]) if len(words) > 1 else 0


async def streamed(port: int, model: str, ids: list[int], new: int) -> tuple[float, float, int]:
    """Seconds to the first piece and to the end of a stream, and the tokens that its usage tells."""
    body = {"model": model, "prompt": ids, "max_tokens": new, "temperature": 0, "stream": True}
    begun = time.perf_counter()
    body |= {"stream_options": {"include_usage": True}}
    reader, writer = await request(port, json.dumps(body).encode())
    status, first, tokens = await status_of(reader), 0.0, 0
    if status != 200:
        raise RuntimeError(f"a server answered {status}: {(await reader.read(500))!r}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begun
            if found := re.search(rb'"completion_tokens": ?(\d+)', line):
                tokens = int(found[1])
    writer.close()
    return first, time.perf_counter() - begun, tokens


async def together(port: int, model: str, size: int, prompt: int, new: int, seed: int) -> dict[str, float]:
    """`size` clients at once: tokens per second over all, and the median seconds to the first piece."""
    draw = random.Random(seed)
    begun = time.perf_counter()
    done = await asyncio.gather(
        *(streamed(port, model, [draw.randrange(4000) for _ in range(prompt)], new) for _ in range(size))
    )
    seconds = time.perf_counter() - begun
    first = statistics.median(one[0] for one in done)
    return {"tokens_per_s": sum(one[2] for one in done) / seconds, "first_s": first}


@contextmanager
def serving(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers on a port."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(1200):
                try:
                    asyncio.run(asyncio.wait_for(ready(port), 5))
                    break
                except (OSError, RuntimeError, TimeoutError):
                    assert process.poll() is None, f"{command} ended with {process.returncode}"
                    time.sleep(0.5)
            else:
                raise RuntimeError(f"{command} does not answer")
            yield process
        finally:
            process.terminate()


async def ready(port: int) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    status = await status_of(reader)
    writer.close()
    if status != 200:
        raise RuntimeError(f"not ready: {status}")


def batch(options: argparse.Namespace, peers: dict[str, str], size: int) -> dict[str, Any]:
    """Each server in turn, with the engine's own steps of so many sequences beside them."""
    rounds: dict[str, list[dict[str, float]]] = {}
    engine = subprocess.Popen(
        [sys.executable, "-c", STEPS, options.model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert engine.stdin and engine.stdout
    commands = {"sparsessm": [*SERVE, options.model, "--port", "{port}", "--name", "model", "--cache", "0"]}
    commands |= {name: command.split() for name, command in peers.items()}
    for number in range(options.rounds):
        for place, (name, command) in enumerate(commands.items()):
            port = options.port + place
            words = [word.replace("{port}", str(port)) for word in command]
            with serving(words, port):
                model = options.peer_model if name != "sparsessm" else "model"
                asyncio.run(together(port, model, size, 8, 16, 0))  # warm
                found = asyncio.run(together(port, model, size, 8, NEW, number))
                if name == "sparsessm":  # at once: the machine may do something else a little later
                    engine.stdin.write(f"{size} {NEW}\n")
                    engine.stdin.flush()
                    alone = {"tokens_per_s": json.loads(engine.stdout.readline())}
                    rounds.setdefault("engine", []).append(alone)
                long = asyncio.run(together(port, model, size, 256, NEW, number))
                found |= {f"{part}_prompt_256": value for part, value in long.items()}
                rounds.setdefault(name, []).append(found)
    engine.stdin.close()
    engine.wait()
    medians = {
        name: {part: statistics.median(one[part] for one in some) for part in some[0]}
        for name, some in rounds.items()
    }
    pairs = zip(rounds["sparsessm"], rounds["engine"], strict=True)
    share = statistics.median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs)
    return {"medians": medians, "share_of_engine": share, "rounds": rounds}


def prefix(options: argparse.Namespace) -> dict[str, float]:
    """A prompt read anew, and again behind its kept state, in turn."""
    port, draw = options.port + 20, random.Random(1)
    cold, warm = [], []
    with serving([*SERVE, options.model, "--port", str(port), "--name", "model"], port):
        asyncio.run(streamed(port, "model", [1, 2, 3], 4))
        for _ in range(options.rounds):
            ids = [draw.randrange(4000) for _ in range(PREFIX)]
            cold.append(asyncio.run(streamed(port, "model", ids, 1))[0])
            warm.append(asyncio.run(streamed(port, "model", [*ids, 5], 1))[0])
    one, other = statistics.median(cold), statistics.median(warm)
    return {"tokens": PREFIX, "read_s": one, "kept_s": other, "share": other / one}


WRONG = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "x", "max_tokens": -1}',
    b"\xff" * 100,
    b'{"n": 99}',
]


async def visitor(port: int, draw: random.Random, seen: Counter[str], until: float, base: list[int]) -> None:
    """A client that does something else every time."""
    while time.monotonic() < until:
        kind = draw.choice(["stream", "stream", "whole", "whole", "cut", "slow", "wrong"])
        shared = base[: draw.randrange(len(base))] if draw.random() < 0.5 else []
        ids = [*shared, *(draw.randrange(4000) for _ in range(draw.randrange(1, 40)))]
        streams = kind in ("stream", "slow") or (kind == "cut" and draw.random() < 0.5)
        body = json.dumps({"prompt": ids, "max_tokens": draw.randrange(1, 80), "stream": streams}).encode()
        try:
            reader, writer = await request(port, draw.choice(WRONG) if kind == "wrong" else body)
            if kind == "cut":
                await asyncio.sleep(draw.random())
                writer.transport.abort()
                seen["cut"] += 1
                continue
            status = await status_of(reader)
            while await reader.read(40 if kind == "slow" else 65536):
                await asyncio.sleep(0.05 if kind == "slow" else 0)
            writer.close()
            seen[f"{kind} {status}"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            seen[f"{kind} {type(error).__name__}"] += 1


async def visits(port: int, clients: int, seconds: float, process: int) -> dict[str, Any]:
    """Many of them at once; memory of the server (bytes) ten times on the way."""
    seen, memory, draw = Counter[str](), [], random.Random(0)
    until, base = time.monotonic() + seconds, [draw.randrange(4000) for _ in range(400)]
    work = [visitor(port, random.Random(n), seen, until, base) for n in range(clients)]

    async def watch() -> None:
        for _ in range(10):
            await asyncio.sleep(seconds / 10)
            memory.append(
                int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            )

    await asyncio.gather(watch(), *work)
    return {"answers": dict(sorted(seen.items())), "memory": memory}


def crowd(options: argparse.Namespace) -> dict[str, Any]:
    """A server among clients of every kind; nothing but the clients' own mistakes may go wrong."""
    port, seconds = options.port + 21, 60 * options.minutes
    command = [*SERVE, options.model, "--port", str(port), "--name", "model", "--cache", "256MB"]
    with serving(command, port) as process:
        found = asyncio.run(visits(port, options.clients, seconds, process.pid))
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as page:
            told = dict(re.findall(r"^sparsessm_(\w+) (\S+)$", page.read().decode(), flags=re.MULTILINE))
        rate = float(told["new_tokens_total"]) / seconds
        first = float(told["time_to_first_token_seconds_sum"]) / float(
            told["time_to_first_token_seconds_count"]
        )
        found |= {"seconds": seconds, "clients": options.clients, "tokens_per_s": rate, "mean_first_s": first}
        found["requests_per_s"] = sum(found["answers"].values()) / seconds
        found["hits"] = float(told["hits_total"]) / float(told["lookups_total"])
        found["cached_share"] = float(told["cached_tokens_total"]) / float(told["prompt_tokens_total"])
    good = {"stream 200", "whole 200", "slow 200", "cut", "wrong 400"}
    found["not_theirs"] = {name: count for name, count in found["answers"].items() if name not in good}
    found["memory_growth"] = found["memory"][-1] / found["memory"][1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--port", type=int, default=18200)
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND with {port}")
    parser.add_argument("--peer-model", default="model", help="how clients call a peer's model")
    parser.add_argument("--parts", default="batch,prefix,crowd")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in options.peer)
    parts = {"batch": lambda: {str(size): batch(options, peers, size) for size in options.batches}}
    parts |= {"prefix": lambda: prefix(options), "crowd": lambda: crowd(options)}
    found: dict[str, Any] = {"model": options.model, "machine": machine.current()}
    for name in options.parts.split(","):
        found[name] = parts[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found.get("crowd", {}).get("not_theirs")))


if __name__ == "__main__":
    sys.exit(main())
