"""What several processes make of a model is what one makes of it, for every kind of model and of plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("mamba", {}),
    "N:M": ("mamba", {"pattern": "2:4", "ignore": ["dt_proj"]}),
    "on the dial": ("mamba", {"bits": 3.5}),
    "the paper's": ("mamba", {"method": "sparsessm", "target": "ssm"}),
    "votes": ("mamba", {"method": "sparsessm-vote", "target": "ssm"}),
    "wanda": ("mamba2", {"method": "wanda", "target": "projections"}),
    "a grid": ("mamba2", {"grid": "int4:8", "sparsity": 0.3}),
    "the head": ("mamba", {"target": "matrices"}),
    "experts": ("jamba", {}),
    "processes without windows": ("mamba", {"windows": 4}),
    "what blocks share": ("zamba2", {}),
    "states": ("mamba", {"pattern": "structured:state"}),
    "channels": ("mamba", {"pattern": "structured:channel"}),
    "blocks": ("mamba", {"pattern": "structured:block"}),
    "a mix": ("mamba2", {"pattern": "structured", "sparsity": 0.2}),
    "projected": ("mamba2", {"pattern": "structured:state", "method": "balanced"}),
    "widths": ("mamba", {"pattern": "structured:channel", "allocation": "loss"}),
}

CODE = """
import hashlib, json, os, sys
sys.path.insert(0, os.environ["TESTS"])
import torch
from torch import distributed
from sparsessm.architectures.ranks import here, join
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    distributed.init_process_group("gloo")
    # of four each sends from a device of its own, as with nccl, which is the CPU here
    join(own=torch.device("cpu") if os.environ["WORLD_SIZE"] == "4" else None)
assert here().count == int(os.environ.get("WORLD_SIZE", 1))
from pico import pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from planned import prune
from sparsessm.architectures import adapt
from sparsessm.calibration import slabs
from sparsessm.calibration.walk import walk
from sparsessm.evaluation.perplexity import measure
from sparsessm.methods.observers import InputGram, InputNorm, StateError, StateMoments, StateReadout
from sparsessm.recipe.recipe import Recipe
slabs.ROWS = 64  # lanes of four windows
tokens = torch.randint(0, 64, (18, 40), generator=torch.Generator().manual_seed(0))
made = {"mamba": lambda: pico_mamba(num_hidden_layers=3), "mamba2": pico_mamba2}
told = {}
for name, (kind, fields) in json.loads(os.environ["CASES"]).items():
    torch.manual_seed(0)
    architecture = adapt(made[kind]() if kind in made else pico_hybrid(kind))
    few = tokens[: fields.pop("windows", len(tokens))]
    report = prune(architecture, Recipe(**fields).resolved(model="pico", trained_length=40), few)
    state = architecture.model.state_dict()
    content = b"".join(state[key].numpy().tobytes() for key in sorted(state))
    nll = measure(architecture, tokens, 1).window_nll
    rows = [(row.target, row.pruned) for row in report.rows]
    told[name] = [hashlib.sha256(content).hexdigest(), rows, nll]
sums = {}
for model in (pico_mamba(), pico_mamba2()):
    torch.manual_seed(0)
    for stop in walk(adapt(model), tokens):
        watching = {target.kind: [InputGram(), InputNorm()] for target in stop.block.targets if target.plain}
        watching["A_log"] = [StateError("memoryless", False), StateError("memoryless", True)]
        watching["states"] = [StateMoments(4), StateReadout()]
        for kind, observers in watching.items():
            for observer in observers:
                stop.run({kind: observer}, until=kind)
                seen = stop.result(observer)
                named = {"": seen} if isinstance(seen, torch.Tensor) else vars(seen)
                for name, part in named.items():
                    if part is not None:
                        content = torch.as_tensor(part).double().numpy().tobytes()
                        what = f"{stop.block.name} {kind} {type(observer).__name__} {name}"
                        sums[type(model).__name__ + what] = hashlib.sha256(content).hexdigest()
told["sums"] = sums
print(json.dumps(told))
os._exit(0)
"""


def cases_of(count: int) -> list[str]:
    """Two processes take a few of them: four divide windows more finely."""
    return [*CASES][:5] if count == 2 else [*CASES]


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    """By the number of processes what each of them has, case by case."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTS", str(Path(ranks.__file__).parent))
        for count in (1, 2, 4):
            patch.setenv("CASES", json.dumps({name: CASES[name] for name in cases_of(count)}))
            results[count] = ranks.ended(ranks.start(count, "-c", CODE))
    assert all(code == 0 for result in results.values() for code, _, _ in result), results
    return {count: [json.loads(out) for _, out, _ in result] for count, result in results.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_result_does_not_depend_on_how_many_they_are(
    case: str, found: dict[int, list[dict[str, Any]]]
) -> None:
    """Weights, what was removed and the losses of windows, bit by bit, in every process."""
    ((alone,),) = ([told[case] for told in found[1]],)
    assert all(told[case] == alone for count in (2, 4) for told in found[count] if case in cases_of(count))


def test_sums_do_not_depend_on_how_many_they_are(found: dict[int, list[dict[str, Any]]]) -> None:
    """Bit by bit, though each process adds up what it has in another order."""
    ((alone,),) = ([told["sums"] for told in found[1]],)
    assert len(alone) > 40
    for told in (*found[2], *found[4]):
        assert [name for name, digest in told["sums"].items() if digest != alone[name]] == []
