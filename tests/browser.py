"""The system's Chromium, headless, told what to do through a pipe (the DevTools protocol)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any


def _found() -> str | None:
    """A browser that starts: where it comes as a snap, its name may stand for none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if program := shutil.which(name):
            with suppress(OSError, subprocess.TimeoutExpired):
                if subprocess.run([program, "--version"], capture_output=True, timeout=30).returncode == 0:
                    return program
    return None


CHROMIUM = _found()
SCRIPT = 'exec "$0" "$@" 3<&0 4>&1 1>/dev/null'  # it reads commands from 3 and answers on 4


class Browser:
    """One page of one browser; what it says on its console and what it asks for is kept.

    Attributes:
        asked: addresses of all requests. stopped: of those that a policy stopped.
        said: messages of the console, errors and violations of the policy.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]
        options += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            ["sh", "-c", SCRIPT, CHROMIUM, *options, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.asked: list[str] = []
        self.stopped: list[str] = []
        self.said: list[str] = []
        self._addresses: dict[str, str] = {}
        self._events: list[str] = []
        self._count = 0
        self._session: str | None = None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        if self._process.poll() is None:
            self.tell("Browser.close")
        self._process.communicate(timeout=30)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def wait(self, event: str) -> None:
        """Until the page has told of an event."""
        while event not in self._events:
            self._read()
        self._events.clear()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        content = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            assert byte, "the browser has gone"
            content += byte
        answer = json.loads(content)
        event, told = answer.get("method", ""), answer.get("params", {})
        self._events.append(event)
        if event == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
            self._addresses[told["requestId"]] = told["request"]["url"]
        elif event == "Network.loadingFailed" and told.get("blockedReason") == "csp":
            self.stopped.append(self._addresses[told["requestId"]])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(told))
        return answer

    def open(self, file: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Show a file in a window so wide, in light or dark colours."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.tell("Page.navigate", url=file.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def value(self, script: str) -> Any:
        """What an expression comes to on the page."""
        answer = self.tell("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, pressed and let go."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            facts = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.tell("Input.dispatchKeyEvent", **facts, **(text if kind == "keyDown" else {}))

    def picture(self, file: Path, *, top: int = 0, height: int = 900) -> None:
        """Write what is shown as a PNG."""
        width = self.value("innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        found = self.tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))
