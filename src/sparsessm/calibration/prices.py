"""Prices: what an error in an output row costs the loss, from one backward pass of the dense model.

To second order the loss changes by 1/2 sum_i F_i mean_t (dW_i x_t)^2 when a linear layer's weight changes by
dW: the Kronecker view of LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244) with a diagonal G = diag(F),
F_i = E[(d loss / d o_i)^2] over the layer's outputs o (docs/methods.md). Rows do not interact in it, so F
changes no repair; it says which rows, matrices and layers may pay for which.

Nothing is trained: gradients flow through activations only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm.architectures import Architecture, Block
from sparsessm.architectures.experts import abreast, reads_stream
from sparsessm.calibration import vocabulary
from sparsessm.calibration.journal import Forgetful, Journal, each
from sparsessm.calibration.loss import nats, predictions
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import first_tokens, grouped
from sparsessm.calibration.walk import backwards, walk

ROWS = 2048  # tokens that go through the model together: several short windows, or one long one
PRICED_TOKENS = 16_384  # of the calibration windows that the backward pass looks at
SENT = "sent "  # before the name of an expert's matrix: how many tokens it got
ALSO = "also "  # before the name of an embedding: what its Hessian gets added for that use of it


def priced(
    architecture: Architecture,
    asked: Mapping[str, str],
    tokens: Tensor | None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> dict[str, Tensor]:
    """The prices of output rows, each target's in the way that it asks for.

    Args:
        asked: target name -> a name of `PRICES`; others ask for none.
        tokens: (W, L) int64 calibration windows; None where there are none, then nothing that needs them.
        journal: keeps what each group of windows says.

    Returns:
        Target name -> (out,) float64; targets that have none of this kind are left out. `ALSO` before the
        name: as of `output_fisher`.

    Raises:
        ValueError: as `output_fisher`.
    """
    found: dict[str, Tensor] = {}
    for name, price in PRICES.items():
        if names := {target for target, kind in asked.items() if kind == name}:
            values = price(architecture, names, tokens, progress, journal)
            found |= {target: row for target, row in values.items() if target.removeprefix(ALSO) in names}
    return found


def row_prices(
    architecture: Architecture,
    tokens: Tensor,
    progress: Progress | None = None,
    journal: Journal | None = None,
    *,
    head: bool = False,
) -> dict[str, Tensor]:
    """What an error in each output row of the dense model's matrices costs the loss, by target.

    Args, Returns, Raises: as `output_fisher`, of the first of the calibration windows.
    """
    return output_fisher(architecture, first_tokens(tokens, PRICED_TOKENS), progress, journal, head=head)


def output_fisher(
    architecture: Architecture,
    tokens: Tensor,
    progress: Progress | None = None,
    journal: Journal | None = None,
    *,
    head: bool = False,
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss at every output of every linear layer of the dense model.

    The loss is the SUM of next-token negative log-likelihoods (nats) over a window; a gradient at step t
    gathers what all later predictions of that window lose. The labels are the text's own (the empirical
    Fisher). The last token of a window predicts nothing; it counts in the mean all the same, as it does in
    the mean of the layers' inputs.

    Memory: the residual stream of one group of windows (some `ROWS` tokens) once per layer, plus the graph of
    one block and `loss.ROWS` rows of logits; whatever the number of windows. Every block is opened twice for
    each group, on the way forward and on the way back.

    Args:
        tokens: (W, L) int64 calibration windows, L at least 2.
        progress: called with ("fisher", steps done, steps in all, block); a step is a block, forward or
            backward.
        journal: keeps what each group of windows says.
        head: the targets of the tail too (vocabulary.py); costs (rows, vocabulary) of work. With `ALSO`
            before the name of an embedding there is a (d_model, d_model), which belongs to its Hessian.

    Returns:
        Target name -> (out,) float64, in nats^2 per unit^2. Linear layers: of their own output, bias
        included, before what follows (dt_proj: before softplus). A_log: (d_model,), of the block's output.
        conv1d is left out: its output before SiLU exists only inside the fused kernel.

    Raises:
        ValueError: tokens of another shape; a block whose output or gradient is not finite, named.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"output_fisher needs windows of shape (at least 1, at least 2), got {tuple(tokens.shape)}"
        )
    groups = grouped(tokens, ROWS)
    blocks = len(architecture.blocks)
    rounds = -(-len(groups) // architecture.ranks.count)
    steps = Steps("fisher", 2 * rounds * blocks, progress, blocks)
    journal = journal or Forgetful(architecture)
    sums: dict[str, Tensor] = {}
    with frozen(architecture.model):
        ranks = architecture.ranks

        def make(number: int) -> dict[str, Tensor]:
            return _energies(architecture, groups[number], steps, head)

        for found in each(ranks, journal, "prices", len(groups), make):
            sums = {name: sums[name] + energy if name in sums else energy for name, energy in found.items()}
    sums = _with_one_token_more(architecture, sums)
    means = {name: energy / tokens.numel() for name, energy in sums.items()}
    also: dict[str, Tensor] = {}
    if head:
        first, *others = (target.name for target in architecture.tail.targets)
        if architecture.tied:
            means[first], also[ALSO + first] = vocabulary.of_both(means)
        else:
            means[first] = vocabulary.of_head(means)
            for name in others:
                means[name], also[ALSO + name] = vocabulary.of_embedding(means)
    return {t.name: means[t.name] for t in architecture.targets if t.name in means} | also


def _with_one_token_more(architecture: Architecture, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums, those of experts as if each had got one token more, an average one of its layer.

    That no token was sent to an expert does not say that none will be (Laplace's rule of succession): with a
    price of nothing it would be removed as a whole. Outputs of first matrices are channels that each expert
    has of its own, and of the tokens only the mean over rows counts; those of second ones are the stream's.

    Args:
        sums: by target; with `SENT` before the name of an expert's how many tokens it got.

    Returns:
        Without those numbers.
    """
    found = {name: part for name, part in sums.items() if not name.startswith(SENT)}
    for block in architecture.blocks:
        for part in abreast([target for target in block.targets if SENT + target.name in sums]):
            names = [target.name for target in part]
            sent = sum(int(sums[SENT + name]) for name in names)
            one = torch.stack([sums[name] for name in names]).sum(0) / max(sent, 1)
            if reads_stream(part[0].kind):
                one = one.mean().expand_as(one)
            found |= {name: sums[name] + one for name in names}
    return found


def _energies(architecture: Architecture, group: Tensor, steps: Steps, head: bool) -> dict[str, Tensor]:
    """Squared gradients at the outputs of each layer, summed over a group of windows (W, L)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:  # (..., out)
        found = {name: energy(grad)}
        if name in routed:
            found[SENT + name] = torch.tensor(grad.numel() // grad.shape[-1])
        sums.update({key: sums[key] + part if key in sums else part for key, part in found.items()})

    routed = {target.name for target in architecture.targets if target.routed}
    group = group.clone()
    entering = _forward(architecture, group, steps)
    back = torch.empty_like(entering[-1])
    words = None
    for stop in backwards(architecture, steps):
        if stop.block is architecture.tail:
            if head:
                size, width = architecture.tail.targets[0].matrix.shape
                words = vocabulary.Sums.nothing(size, width, architecture.tail.device)
            back = head_backward(architecture, entering[-1], group, words)
        else:
            back = block_backward(architecture, stop.block, entering[stop.block.index], back, add)
            architecture.residence.release(entering)
            steps()
    if words is not None:
        words.add_lookups(group.to(back.device), architecture.looked_up(back))
        sums |= vars(words)
    return {name: energy.cpu() for name, energy in sums.items()}  # as a journal gives them back


def energy(grad: Tensor) -> Tensor:
    """(out,) float64, the squares of a gradient (..., out), summed."""
    # in float64: gradients of a model that is sure of itself have squares below float32's range
    return grad.flatten(0, -2).double().square().sum(0)


def _forward(architecture: Architecture, tokens: Tensor, steps: Steps) -> Tensor:
    """The input of each block and of the tail, (blocks + 1, W, L, d_model)."""
    blocks = len(architecture.blocks)
    entering = torch.empty(0)
    for stop in walk(architecture, None, tokens, tail=True, steps=steps):
        (states,) = stop.groups
        if not len(entering):
            entering = architecture.residence.room(states, blocks + 1, *states.shape)
        entering[min(stop.block.index, blocks)] = states
        if stop.block is not architecture.tail:
            stop.advance()
            _refuse_non_finite(stop.groups[0], f"{stop.block.name}: the output")
            architecture.residence.release(entering)
            steps()
    return entering


def head_backward(
    architecture: Architecture, hidden: Tensor, tokens: Tensor, words: vocabulary.Sums | None = None
) -> Tensor:
    """d loss / d hidden, (W, L, d_model), after the last block; inside of `frozen`.

    Args:
        hidden: (W, L, d_model) behind the last block. tokens: (W, L) int64.
        words: is told of the head's inputs and logits.

    Raises:
        ValueError: a gradient that is not finite.
    """
    parts = []
    hidden, tokens = hidden.to(architecture.tail.device), tokens.to(architecture.tail.device)
    if words is not None:
        architecture.tail.forward(hidden, taps={"lm_head": (power := vocabulary.Power())})
        words.power = power.result()
    with architecture.tail.computing(architecture.compute.used):
        for rows, right in predictions(hidden, tokens):
            part = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = architecture.head(part[None])[0]  # (rows, vocabulary)
                loss = nats(logits, right).sum()
            (dpart,) = torch.autograd.grad(loss, [part])
            _refuse_non_finite(dpart, f"{architecture.tail.name}: the gradient at its input")
            parts.append(dpart)
            if words is not None:
                words.add_logits(logits, architecture.logit_scale)
    back = torch.cat(parts).view(len(tokens), -1, hidden.shape[-1])
    return F.pad(back, (0, 0, 0, 1))  # the last token predicts nothing


def block_backward(
    architecture: Architecture, block: Block, hidden: Tensor, back: Tensor, add: Callable[[str, Tensor], None]
) -> Tensor:
    """d loss / d the block's input (W, L, d_model); inside of `frozen`.

    Args:
        block: which is open. hidden: its input (W, L, d_model). back: d loss / d its output, likewise.
        add: receives the name of each target and the gradient at its output.

    Raises:
        ValueError: a gradient that is not finite; names the layer.
    """
    for target in block.targets:
        if target.kind == "A_log":  # the mixer writes the first part of the stream, in Zamba2 not all
            writes = block.targets[block.targets.index(target) + 1]  # out_proj, whatever its name
            width = writes.matrix.shape[0]
            add(target.name, back[..., :width].to(block.device))
    hidden, back = hidden.detach().to(block.device).requires_grad_(), back.to(block.device)
    compute = architecture.compute.used
    with torch.enable_grad(), block.computing(compute), block.outputs() as outputs:
        out, _ = block.forward(hidden)
    assert out is not None
    before, *grads = torch.autograd.grad(out, [hidden, *outputs.values()], back, allow_unused=True)
    for name, grad in zip(outputs, grads, strict=True):
        if grad is None:  # an expert to which no token was sent
            grad = torch.zeros_like(outputs[name])
        _refuse_non_finite(grad, f"{block.name}: the gradient at the output of {name}")
        add(name, grad)
    _refuse_non_finite(before, f"{block.name}: the gradient at its input")
    return before


def _refuse_non_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values.sum()):  # nothing cancels an infinity
        raise ValueError(f"{what} is not finite on the calibration windows")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in a graph meanwhile, and gradients flow.

    Tensors made in inference mode could not be part of a graph, so it is left if it is on.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _by_fisher(
    architecture: Architecture,
    names: Collection[str],
    tokens: Tensor | None,
    progress: Progress | None,
    journal: Journal | None,
) -> Mapping[str, Tensor]:
    head = any(target.name in names for target in architecture.tail.targets)
    return {} if tokens is None else row_prices(architecture, tokens, progress, journal, head=head)


def _by_norms(architecture: Architecture, *_: object) -> Mapping[str, Tensor]:
    return output_norms(architecture)


# Name -> (architecture, targets that ask, windows, progress, journal) -> prices of these targets, or of more.
PRICES: Mapping[str, Callable[..., Mapping[str, Tensor]]] = {"norms": _by_norms, "fisher": _by_fisher}


def output_norms(architecture: Architecture) -> dict[str, Tensor]:
    """The forward-only stand-in for `output_fisher`, from weights alone; see `block_norms` for what is crude.

    Returns:
        Target name -> (out,) float64, relative: only ratios mean something, and those best within a matrix.
    """
    found = {}
    for stop in walk(architecture, None):
        norms = block_norms(stop.block)
        found |= {target.name: norms[target.kind] for target in stop.block.targets if target.kind in norms}
    return found


def block_norms(block: Block) -> dict[str, Tensor]:
    """How strongly each output row of a mixer's matrices is read by what follows it in the layer.

    What a unit error of a row writes into the residual stream, squared and summed, if everything in between
    passed it on with factor one: channel d of the scan's output writes omega_d = |out_proj[:, d]|^2. Rows of
    in_proj (x and z), conv1d and dt_proj belong to one channel; a step row of x_proj reaches all of them
    through dt_proj, one of Mamba-2's in_proj all of its head's. A row of B or C reaches all of them too, but
    how far only the states could tell: it weighs as much as the mean step row.

    What is crude: the factor one (gate, norm, softplus, state and step size are ignored), the residual stream
    is taken to be equally sensitive in every direction and layer (out_proj: ones), and the way from x through
    x_proj is left out. Against the Fisher of `builtin:pycode` ranks of rows correlate with 0.6 for in_proj
    and dt_proj, where silent channels show; within x_proj it is hardly better than no weights.

    Returns:
        Kind -> (out,) float64; only what is known, nothing for a layer without a Mamba mixer.
    """
    matrix = {target.kind: target.matrix.double() for target in block.targets}
    if not {"A_log", "in_proj", "out_proj"} <= matrix.keys():
        return {}
    omega = matrix["out_proj"].square().sum(0)  # (D,)
    states = matrix["A_log"].shape[1]
    ones = torch.ones_like(matrix["out_proj"][:, 0])  # (d_model,)
    found = {"A_log": ones, "out_proj": ones}
    if "x_proj" not in matrix:  # Mamba-2: gate, x, B, C and the steps of the heads in one
        heads = omega.view(len(matrix["A_log"]), -1).sum(1)
        mixed = torch.cat([omega, heads.mean().expand(len(matrix["conv1d"]) - len(omega))])
        return found | {"in_proj": torch.cat([omega, mixed, heads]), "conv1d": mixed}
    step = omega @ matrix["dt_proj"].square()  # (rank,)
    return found | {
        "in_proj": torch.cat([omega, omega]),
        "conv1d": omega,
        "x_proj": torch.cat([step, step.mean().expand(2 * states)]),
        "dt_proj": omega,
    }
