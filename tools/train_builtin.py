"""Trains the built-in models, a small stock Mamba (`builtin:pycode`), and of its size a Mamba-2
(`builtin:pycode2`), a text model of the Qwen3.5 type (`builtin:pydelta`) and one of the Granite 4 type
(`builtin:pyhybrid`), on the Python standard library, and exports them.

    python tools/train_builtin.py train --compile --hours 2       # resumes from build/train
    python tools/train_builtin.py export src/sparsessm/builtin/pycode
    python tools/train_builtin.py train --architecture mamba2 --compile --hours 2  # in build/train-mamba2
    python tools/train_builtin.py export --architecture mamba2 src/sparsessm/builtin/pycode2
    python tools/train_builtin.py train --architecture qwen3_5_text --compile --hours 2
    python tools/train_builtin.py export --architecture qwen3_5_text src/sparsessm/builtin/pydelta

Text: the training side of `stdlib`, and where this Python carries them the training side of its test modules
as extra text, which the last part of the run leaves out. Held-out modules are only ever evaluated.

Optimiser: Muon for the projections, AdamW for the rest; the learning rate is constant, then falls linearly to
zero at the end of the time. The windows of a step are shared between single-threaded processes that meet once
a step: on a busy machine twice as fast as one process whose threads meet after every operation. Random
choices depend on the seed and the step alone, so a resumed run draws what it would have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fast_delta
import fast_granite
import fast_mamba
import fast_mamba2
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor
from train_tokenizer import train_tokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from sparsessm.data.texts import evaluation_windows, stdlib_modules

LENGTH, ENTRIES, WINDOWS = 1024, 4096, 4  # tokens in a window, vocabulary, windows in a step
WARMUP_STEPS, DECAY_SHARE, DECAY_START = 40, 0.2, 0.45  # DECAY_SHARE: last part of the run, library text only
TEST_SHARE = 0.42  # of the windows drawn from test modules before that
MUON_RATE, ADAM_RATE, EMA = 0.02, 3e-3, 0.995
NAMES = {False: "library.pt", True: "tests.pt"}
MUON = ("in_proj.weight", "x_proj.weight", "out_proj.weight", *fast_delta.MUON, *fast_granite.MUON)
OTHERS = {"qwen3_5_text": fast_delta, "granitemoehybrid": fast_granite}  # by model_type
FAST = {"mamba": fast_mamba, "mamba2": fast_mamba2, **OTHERS}
FOLDERS = {
    "mamba": Path("build/train"),
    "mamba2": Path("build/train-mamba2"),
    "qwen3_5_text": Path("build/train-delta"),
    "granitemoehybrid": Path("build/train-hybrid"),
}


def new_model(architecture: str, layers: int, seed: int) -> PreTrainedModel:
    """A random model; output projections start at zero, so that each block starts as the identity."""
    torch.manual_seed(seed)
    if architecture in OTHERS:
        return OTHERS[architecture].new_model(ENTRIES, layers)
    common = dict(
        vocab_size=ENTRIES, hidden_size=256, num_hidden_layers=layers, expand=2, conv_kernel=4,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    if architecture == "mamba":
        model = MambaForCausalLM(MambaConfig(state_size=16, **common)).float()
    else:
        sizes = dict(state_size=64, head_dim=64, num_heads=8, n_groups=1, chunk_size=64)
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, **common)).float()
    model.backbone.embeddings.weight.data.normal_(std=0.02)
    for block in model.backbone.layers:
        mixer = block.mixer
        torch.nn.init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
        if architecture == "mamba":
            torch.nn.init.kaiming_uniform_(mixer.x_proj.weight, a=math.sqrt(5))
        else:  # as its authors start it; transformers would take 1, 2, 3, ...
            mixer.A_log.data.uniform_(1, 16).log_()
        mixer.out_proj.weight.data.zero_()
    return model


class Stream:
    """Windows of one token array: every epoch a new offset and a new order, both drawn from (seed, epoch)."""

    def __init__(self, tokens: Tensor, seed: int) -> None:
        self.tokens, self.seed, self.epoch = tokens, seed, -1
        self.cells = tokens.numel() // (LENGTH + 1) - 1

    def window(self, number: int) -> Tensor:
        """The window of this running number, (LENGTH + 1,)."""
        epoch, place = divmod(number, self.cells)
        if epoch != self.epoch:
            random = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            self.offset = int(torch.randint(LENGTH, (1,), generator=random))
            self.order = torch.randperm(self.cells, generator=random).tolist()
            self.epoch = epoch
        start = self.offset + self.order[place] * (LENGTH + 1)
        return self.tokens[start : start + LENGTH + 1]


def token_array(tokenizer: object, path: Path, *, tests: bool) -> Tensor:
    """The tokens of all training modules in a random fixed order, an end of text before each; cached."""
    if not path.exists():
        texts = [text for _, text in stdlib_modules(held_out=False, tests=tests)]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        pieces = [torch.tensor([0, *tokenizer(texts[i], verbose=False)["input_ids"]]) for i in order]
        torch.save(torch.cat(pieces), path)
    return torch.load(path)


def muon_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The matrices Muon moves; in_proj is several in one parameter: x and z, or gate, x, B, C and steps."""
    config = model.config
    rows = [config.hidden_size * getattr(config, "expand", 0)] * 2
    if config.model_type == "mamba2":
        rows += [config.n_groups * config.state_size] * 2 + [config.num_heads]
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith(MUON):
            if config.model_type in OTHERS:
                sizes = OTHERS[config.model_type].rows(name, config) or [len(parameter)]
            else:
                sizes = rows if "in_proj" in name else [len(parameter)]
            # experts lie one below another
            data, grads = (t.flatten(0, -2) for t in (parameter.data, parameter.grad))
            for part, grad in zip(data.split(sizes), grads.split(sizes), strict=True):
                part.grad = grad
                found.append(part)
    return found


@torch.no_grad()
def evaluate(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean negative log-likelihood in nats per predicted token, over windows (W, LENGTH)."""
    total = torch.zeros(1)
    ranks = dist.get_world_size()
    for window in windows[dist.get_rank() :: ranks].split(WINDOWS // ranks):
        hidden = FAST[model.config.model_type].final_hidden(model, window)[:, :-1].flatten(0, 1)
        logits = hidden @ model.get_input_embeddings().weight.t()
        total += torch.nn.functional.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    dist.all_reduce(total)
    return float(total) / windows[:, 1:].numel()


def train(arguments: argparse.Namespace) -> None:
    """Starts the processes and waits for them."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # glibc hands large freed blocks back to the kernel, which clears every page anew: 8 % of the CPU time
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 36))
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(ENTRIES, LENGTH).save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for tests in (False, True):
        token_array(tokenizer, folder / NAMES[tests], tests=tests)
    mp.spawn(train_process, (arguments,), nprocs=arguments.processes)


def train_process(rank: int, arguments: argparse.Namespace) -> None:
    """One of the training processes; all hold the same model and do the same steps on the mean gradient."""
    folder: Path = arguments.folder
    fast = FAST[arguments.architecture]
    torch.set_num_threads(1)
    place = (folder / "meeting").resolve().as_uri()
    dist.init_process_group("gloo", place, rank=rank, world_size=arguments.processes)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    library = Stream(token_array(tokenizer, folder / NAMES[False], tests=False), arguments.seed)
    tests = Stream(token_array(tokenizer, folder / NAMES[True], tests=True), arguments.seed + 1)
    held_out, n_bytes = evaluation_windows("stdlib", tokenizer, length=LENGTH)
    bits = held_out[:, 1:].numel() / n_bytes / math.log(2)  # nats per token -> bits per byte
    say(
        f"tokens: library {library.tokens.numel()}, tests {tests.tokens.numel()}; held out {held_out.numel()}"
    )
    if arguments.compile:
        fast.compile_pieces()

    other = OTHERS.get(arguments.architecture)
    layers = arguments.layers or (other.LAYERS if other else 7)
    model = new_model(arguments.architecture, layers, arguments.seed)
    say(f"{sum(p.numel() for p in model.parameters())} parameters, {arguments}")
    others = [p for name, p in model.named_parameters() if not name.endswith(MUON)]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon = Muon(muon_matrices(model))
    average = [p.detach().clone() for p in model.parameters()]
    step, used, drawn = 0, 0.0, [0, 0]  # steps done, seconds of earlier runs, windows drawn of each stream
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt")
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momenta, average = state["muon"], state["average"]
        step, used, drawn = state["step"], state["seconds"], state["drawn"]
        say(f"resumed at step {step}")

    def save() -> None:
        if rank:
            return
        state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.momenta}
        state |= {"average": average, "step": step, "seconds": used + time.time() - began, "drawn": drawn}
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")

    def measure(windows: Tensor, label: str) -> float:
        nll = evaluate(model, windows)
        spent = f"{step * WINDOWS * LENGTH} tokens, {used + time.time() - began:.0f} s"
        scores = f"nll {nll:.4f}, perplexity {math.exp(nll):.3f}, bits per byte {nll * bits:.4f}"
        say(f"held-out {label}: {spent}, {scores}")
        return nll

    began = time.time()
    end = math.inf  # a budget in steps
    if arguments.hours:
        end = began + arguments.hours * 3600 - used
    elif arguments.until:
        end = deadline(arguments.until).timestamp()
    some = held_out[:: len(held_out) // 48][:48]  # spread over all modules
    parameters = list(model.parameters())
    saved = measured = shown = began
    shown_step, running = step, 0.0
    while True:
        now = time.time()
        done = step / arguments.steps if arguments.steps else (now - began + used) / (end - began + used)
        plan = torch.tensor([done, now - measured > arguments.measure], dtype=torch.float64)
        dist.broadcast(plan, 0)  # one clock for all
        done = float(plan[0])
        if done >= 1:
            break
        if plan[1]:
            measure(some, "sample")
            measured = time.time()
        random = torch.Generator().manual_seed(arguments.seed + 7 * step)
        windows = []
        for share in torch.rand(WINDOWS, generator=random).tolist():
            which = int(share < TEST_SHARE and done < 1 - DECAY_SHARE)
            windows.append((library, tests)[which].window(drawn[which]))
            drawn[which] += 1
        rate = min(1.0, (step + 1) / WARMUP_STEPS, (1 - done) / (1 - DECAY_START))
        for parameter in parameters:
            parameter.grad.zero_()
        value = fast.loss(model, torch.stack(windows[rank :: arguments.processes]))
        value.backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [value.detach().view(1)])
        dist.all_reduce(flat)
        flat /= arguments.processes
        mean_loss = float(flat[-1])
        for parameter, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not math.isfinite(norm):
            raise RuntimeError(f"step {step}: gradient norm {norm}")
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        adam.step()
        muon.step(MUON_RATE * rate, 0.85 + 0.1 * min(1.0, step / 200))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - EMA)
        step += 1
        running += mean_loss
        now = time.time()
        if step % arguments.every == 0:
            speed = (step - shown_step) * WINDOWS * LENGTH / (now - shown)
            mean = running / (step - shown_step)
            say(
                f"step {step} done {done:.3f} loss {mean:.4f} norm {norm:.3f} rate {rate:.3f} "
                f"{speed:.0f} tokens/s {datetime.now(UTC):%H:%M:%S}"
            )
            shown, shown_step, running = now, step, 0.0
        if now - saved > 180:
            save()
            saved = time.time()
    save()
    plain = measure(held_out, "all, final weights")
    last = [p.detach().clone() for p in model.parameters()]
    for parameter, mean in zip(model.parameters(), average, strict=True):
        parameter.data.copy_(mean)
    if measure(held_out, "all, averaged weights") > plain:
        for parameter, value in zip(model.parameters(), last, strict=True):
            parameter.data.copy_(value)
    if rank == 0:
        torch.save(model.state_dict(), folder / "final.pt")
    say(f"windows drawn: library {drawn[0]}, tests {drawn[1]}")


def say(line: str) -> None:
    """Prints from the first process only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def deadline(clock: str) -> datetime:
    """The next moment at which a UTC clock shows HH:MM."""
    hour, minute = map(int, clock.split(":"))
    now = datetime.now(UTC)
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return moment if moment > now else moment + timedelta(days=1)


def export(arguments: argparse.Namespace) -> None:
    """Writes a stock checkpoint: matrices in bfloat16; A_log, D, dt_bias and norms in float32."""
    final = arguments.folder / "final.pt"
    state = torch.load(final) if final.exists() else torch.load(arguments.folder / "state.pt")["model"]
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    model = new_model(arguments.architecture, layers, 0)
    model.load_state_dict(state)
    target: Path = arguments.target
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():  # the tied head is not stored twice
        keep = name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight"))
        tensors[name] = parameter.detach().to(torch.float32 if keep else torch.bfloat16).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors makes it private
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32  # how stock code opens it: in bfloat16 it would round A_log
    model.config.save_pretrained(target)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(target)
    AutoTokenizer.from_pretrained(arguments.folder / "tokenizer").save_pretrained(target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only"):  # how it was loaded here
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to older versions too
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(json.dumps({path.name: path.stat().st_size for path in sorted(target.iterdir())}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="state, caches, tokenizer (build/train, build/train-mamba2, ...)"
    )
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--architecture", choices=sorted(FAST), default="mamba")
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", parents=[which])
    budget = training.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--steps", type=int, help=f"budget in steps of {WINDOWS * LENGTH} tokens (reproducible)"
    )
    budget.add_argument("--hours", type=float, help="budget in time")
    budget.add_argument("--until", help="budget as a UTC clock time, HH:MM")
    training.add_argument("--layers", type=int, help="default: 7; 6 of those with attention")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--processes", type=int, default=2, choices=(1, 2, 4))
    training.add_argument("--every", type=int, default=20, help="steps between two lines")
    training.add_argument("--measure", type=float, default=600, help="seconds between two evaluations")
    training.add_argument(
        "--compile", action="store_true", help="fuse elementwise work (needs a C++ compiler)"
    )
    training.set_defaults(run=train)
    exporting = commands.add_parser("export", parents=[which])
    exporting.add_argument("target", type=Path)
    exporting.set_defaults(run=export)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder or FOLDERS[arguments.architecture]
    arguments.run(arguments)


if __name__ == "__main__":
    main()
