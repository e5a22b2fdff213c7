"""Where and how a model is served.

Place in the flow: the command fills it, `running.py` and `api.py` keep to it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Where and how a model is served.

    Attributes:
        name: that clients ask for. host, port: where; port 0 is any free one.
        key: that clients must send; None: none.
        batch: sequences that run together. waiting: requests that may wait.
        cache: bytes for states of prompts.
        new_tokens, prompt_tokens: of an answer and of a prompt, at most. seconds: for a request, at most.
        prompts: of one request, times its `n`, at most. body: bytes of a request, at most.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    batch: int = 16
    waiting: int = 256
    cache: int = 1 << 30
    new_tokens: int = 4096
    prompt_tokens: int = 32768
    seconds: float = 600.0
    prompts: int = 256
    body: int = 8 << 20

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
