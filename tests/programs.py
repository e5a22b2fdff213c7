"""Programs that tests start, without the seconds that torch and transformers take to import in each.

One process has imported what others wrote, and forks for every program. That is then a process of its own,
with its own arguments, environment, directory and streams; it imports all of sparsessm anew, and ends as any
Python ends. A test of the start, or of what a library reads while it is imported, takes `subprocess`.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import IO, Any, NamedTuple, Self

LIBRARIES = """torch transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
transformers.models.mamba.modeling_mamba transformers.models.mamba2.modeling_mamba2 pydantic.main yaml
typer.rich_utils rich.progress rich.table safetensors.torch huggingface_hub""".split()
ALONE = {"OMP_NUM_THREADS": "1"}  # two programs run on two cores
# What is read when Python starts or a library is imported; programs have it from the process that forks.
EARLY = tuple("PYTHON LD_ MKL_ ONEDNN_ ATEN_ TORCH HF_ TRANSFORMERS_ TOKENIZERS_".split())


class Program:
    """A running `python -m MODULE ...` or `python -c CODE ...`: of `subprocess.Popen` what tests need.

    A stream is a pipe, with our end in `stdout` or `stderr`, or the file or number that is given."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> None:
        assert command[0] == sys.executable and command[1] in ("-m", "-c"), command
        env = {**(os.environ if env is None else env), **ALONE}
        late = {name for name, _ in env.items() ^ _forking().env.items() if name.startswith(EARLY)}
        assert not late, f"{late} would come too late"
        self.returncode: int | None = None
        (self.stdout, out), (self.stderr, err), (self._told, told) = map(_ends, (stdout, stderr, None))
        socket.send_fds(_forking().line, [b"."], [out, err, told])
        asked = {"command": command[1:], "env": env, "cwd": os.getcwd()}
        _forking().line.sendall(json.dumps(asked).encode() + b"\n")
        for ours, theirs in ((self.stdout, out), (self.stderr, err), (self._told, told)):
            if ours:
                os.close(theirs)
        self.pid = int(self._told.readline())

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; of a program that a signal ended, the signal's number, negative."""
        if self.returncode is None:
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it prints up to its end; after `timeout` seconds it is killed."""
        late = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        late.start()
        try:
            with self, ThreadPoolExecutor(2) as both:
                out, err = both.map(lambda file: file.read() if file else "", (self.stdout, self.stderr))
        finally:
            late.cancel()
        return out, err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


def run(command: Sequence[str], timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a program printed, and how it ended."""
    program = Program(command, **options)
    printed = program.communicate(timeout)
    return subprocess.CompletedProcess(command, program.wait(), *printed)


def _ends(given: int | IO[Any] | None) -> tuple[Any, int]:
    """Our end of a stream, if it is a pipe, and the number of the program's end."""
    if given is not None:
        return None, given if isinstance(given, int) else given.fileno()
    ours, theirs = os.pipe()
    return open(ours, encoding="utf-8", errors="backslashreplace"), theirs


# ---- the process that forks


class _Forking(NamedTuple):
    line: socket.socket
    process: subprocess.Popen[bytes]
    env: dict[str, str]


@cache
def _forking() -> _Forking:
    """Started with the first program."""
    ours, theirs = socket.socketpair()
    env, number, nothing = {**os.environ, **ALONE}, theirs.fileno(), subprocess.DEVNULL
    line = [sys.executable, __file__, str(number)]
    options: Any = {"stdin": nothing, "stdout": nothing, "process_group": 0}
    with theirs:
        return _Forking(ours, subprocess.Popen(line, env=env, pass_fds=[number], **options), env)


def end() -> None:
    """Ends the process that forks."""
    if _forking.cache_info().currsize:
        _forking().line.close()
        _forking().process.wait()
        _forking.cache_clear()


def _serve(line: socket.socket) -> list[str]:
    """Fork for whoever asks. Returns in each program, with what it is to run."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # what is here is no garbage of a program's
    while (received := socket.recv_fds(line, 1, 3))[0]:
        asked, streams = json.loads(line.makefile().readline()), received[1]
        if not os.fork():
            return _program(line, asked, *streams)
        for number in streams:
            os.close(number)
    sys.exit()


def _program(line: socket.socket, asked: dict[str, Any], out: int, err: int, told: int) -> list[str]:
    """One more process, whose end this one tells: whoever asked is not its parent and cannot wait for it."""
    line.close()
    if program := os.fork():
        os.close(out)
        os.close(err)
        os.write(told, f"{program}\n".encode())
        os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])}\n".encode())
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in (out, err, told):
        os.close(number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    return asked["command"]


if __name__ == "__main__":
    _kind, _what, *_words = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0], sys.argv = "", [_kind, *_words]
    if _kind == "-m":
        runpy.run_module(_what, run_name="__main__", alter_sys=True)
    else:
        exec(_what, {"__name__": "__main__"})
