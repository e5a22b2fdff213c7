"""docs/machines.md says of each command where it runs, as the code does."""

from __future__ import annotations

import inspect
import re

from sources import ROOT

from sparsessm import cli
from sparsessm.cli.ranks import SHARED


def test_the_table_says_what_the_commands_do() -> None:
    page = (ROOT / "docs/machines.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\S+)` \| (yes|no) \| (yes|no) \|$", page, flags=re.MULTILINE)
    words = {True: "yes", False: "no"}
    commands = {}
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        device = "device" in inspect.signature(command.callback).parameters
        commands[name] = words[device], words[name in SHARED]
    assert {name: (device, shared) for name, device, shared in told} == commands
    assert set(SHARED) <= commands.keys()
