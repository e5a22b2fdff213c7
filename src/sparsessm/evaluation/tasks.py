"""Zero-shot accuracy: the tasks of lm-evaluation-harness (lm_eval, the extra `eval`) on our own forward.

    from sparsessm.evaluation.tasks import zero_shot

    print(zero_shot(sparsessm.load("builtin:pycode"), ["piqa", "arc_easy"], limit=100).record())

Used after pruning, never by it. Prompts, tokenisation, truncation and metrics are the harness's: its
model type `hf` with only the forward replaced, so that a dense model gets the log-likelihoods that
`lm_eval --model hf` gives it (tests/evaluation/test_tasks.py compares every one). Only tasks that are scored
by likelihoods; one that generates text takes the stock model, and `lm_eval` itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import logging
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsessm.calibration.progress import Progress
from sparsessm.calibration.walk import final
from sparsessm.checkpoint.tokenizing import splitting
from sparsessm.evaluation.comparison import PAPER, Metric, Score, ZeroShot, mean_error

if TYPE_CHECKING:
    from sparsessm.checkpoint import Checkpoint

Request = tuple[Any, list[int], list[int]]  # (texts, tokens of the context, tokens of the continuation)

MAX_LENGTH = 2048  # tokens of a request for a model that states no length of its own, as in the harness
TOKENS = 2048  # tokens that go through the model together, padding included
LOGITS = 2**26  # and at most so many logits: 256 MB, and once more for their softmax
LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


def zero_shot(
    checkpoint: Checkpoint,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    progress: Progress | None = None,
) -> ZeroShot:
    """Measures a model on tasks of lm-evaluation-harness.

    Args:
        checkpoint: what `sparsessm.load` returned, pruned or not.
        tasks: names of tasks, groups ("mmlu") or tags ("ai2_arc"); those of lm_eval fetch their data.
        limit: only so many documents of each task, the first ones (the harness's own `--limit`).
        include_path: a directory with task files (YAML) of your own; their names go before those of lm_eval.
            What a file names with `!function` is Python, and runs.
        progress: called with ("load tasks", tasks loaded, tasks, ""), then (task, requests done, requests,
            "").

    Raises:
        ValueError: lm_eval is not installed; no task, an unknown one, or one that generates text; its data
            cannot be had, or its file does not fit its data; `include_path` is no directory; `limit` below 1;
            a tokenizer with no token for the beginning or end of a text; a likelihood that is not finite; or
            as `adapt`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"zero-shot tasks need limit >= 1 or None, got {limit}")
    names = list(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise ValueError(f"no task; name some, for example {', '.join(PAPER)}")
    model = language_model(checkpoint)
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # pyright: ignore[reportMissingImports]

    with _quiet():
        found, groups = _load(names, include_path, progress)
        rows: dict[str, Any] = {}
        scores: dict[str, Score] = {}
        for name, task in found.items():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            model.begin(progress and functools.partial(_told, progress, name))
            rows[name], scores[name] = _score(model, name, task, limit)
        for name, group in groups.items():
            if group.has_aggregation:
                parts = [scores[task.task_name] for task in group.get_all_tasks()]
                scores[name] = _group_score(name, group, group.aggregate(rows), parts)
    return ZeroShot(tuple(scores.values()), importlib.metadata.version("lm_eval"), model.max_length, limit)


def language_model(checkpoint: Checkpoint) -> Any:
    """The model as lm_eval wants it: its own `HFLM` (model type `hf`), with our forward for the stock one.

    For those who call the harness themselves: `lm_eval.simple_evaluate(model=language_model(...), ...)`.

    Raises:
        ValueError: lm_eval is not installed, the tokenizer has no token for the beginning or end of a text,
            or as `adapt`.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f'zero-shot tasks need lm-evaluation-harness: pip install "sparsessm[eval]" ({error})'
        ) from error
    harness: Any = HFLM
    architecture = checkpoint.architecture()
    config: Any = checkpoint.model.config
    room = max(1, min(TOKENS, LOGITS // config.vocab_size))
    tokenizer = deepcopy(checkpoint.tokenizer)  # the harness gives its tokenizer a padding token
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("zero-shot tasks need a tokenizer with a token for the beginning or end of a text")

    class FastLM(harness):
        """`_model_call` is ours, which requests go through the model together, and what a failing tokenizer
        says; the rest is inherited."""

        truncated = 0
        _report: Callable[[int, int], None] | None = None
        _unread = 0  # positions before every continuation of the batch: their logits are not computed

        def begin(self, report: Callable[[int, int], None] | None) -> None:
            """Count anew, and report requests done to this function."""
            self.truncated, self._report = 0, report

        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            with splitting():
                return super().tok_encode(*arguments, **options)

        def _model_call(
            self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            # (W, L) tokens padded on the right -> (W, L - unread, vocabulary): what is missing in front, HFLM
            # deducts (its "virtual tokens"). No padding reaches the logits before it.
            with torch.inference_mode():
                (hidden,) = final(architecture, inps)
                return architecture.head(hidden[:, self._unread :])

        def _loglikelihood_tokens(
            self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            for _, context, continuation in requests:
                if not context or not 1 <= len(continuation) <= self.max_length:
                    sizes = f"{len(context)} tokens of context and {len(continuation)} of continuation"
                    allowed = f"at least 1, and 1 to {self.max_length}, the model's length"
                    raise ValueError(f"a request has {sizes}; allowed: {allowed}")
                self.truncated += len(context) + len(continuation) > self.max_length + 1
            answers: dict[int, tuple[float, bool]] = {}
            for batch in batches(requests, self.max_length, room):
                some = [requests[number] for number in batch]
                self._unread = min(min(len(a) + len(b) - 1, self.max_length) - len(b) for _, a, b in some)
                answers.update(
                    zip(batch, super()._loglikelihood_tokens(some, disable_tqdm=True), strict=True)
                )
                if not all(math.isfinite(answers[number][0]) for number in batch):
                    raise ValueError("the likelihood of a text is not finite")
                if self._report:
                    self._report(len(answers), len(requests))
            return [answers[number] for number in range(len(requests))]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise ValueError("tasks that generate text are not supported")

    with _quiet():
        return FastLM(
            checkpoint.model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=checkpoint.trained_length or MAX_LENGTH,
            batch_size=2**30,  # the batches are made in _loglikelihood_tokens
        )


def batches(requests: Sequence[Request], length: int, room: int) -> list[list[int]]:
    """Which requests go through the model together: numbers of requests, the longest first.

    Requests that differ only in their last token are one row for the model, as in the harness.

    Args:
        requests: (anything, context tokens, continuation tokens); what is longer than `length` + 1 is cut.
        length: tokens of a row at most.
        room: tokens of a batch, padding included; a row that is longer goes alone.
    """
    texts = [context + continuation for _, context, continuation in requests]
    made: list[list[int]] = []
    rows = space = 0
    last: list[int] | None = None
    for number in sorted(range(len(texts)), key=lambda number: (-len(texts[number]), texts[number])):
        if (read := texts[number][:-1]) != last:
            if rows == space:
                made.append([])
                rows, space = 0, max(1, room // max(1, min(len(read), length)))
            rows, last = rows + 1, read
        made[-1].append(number)
    return made


@functools.cache
def _catalogue() -> Any:
    """lm_eval's own tasks: some 15,000 files, read once."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager()


def _manager(name: str, include_path: str | Path | None, own: Any) -> Any:
    """Where to look for this name: `own` are the tasks in `include_path`, None without one."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if own and name in own.all_tasks:  # a group may name tasks of lm_eval
        return TaskManager(include_path=include_path) if name in own.all_groups else own
    known = _catalogue().all_tasks
    if name in known:
        return _catalogue()
    near = get_close_matches(name, {*known, *(own.all_tasks if own else ())}, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    more = "a task file of your own needs its directory: include_path= (--include-path)"
    if own is not None:
        more = f"task files in {str(include_path)!r}: {', '.join(own.all_tasks) or 'none that can be read'}"
    raise ValueError(f"unknown task {name!r}{hint}; {more}")


def _told(progress: Progress, task: str, done: int, total: int) -> None:
    progress(task, done, total, "")


def _load(
    names: list[str], include_path: str | Path | None, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks and groups of these names, with their data."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    own = None
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"include_path {str(include_path)!r}: no such directory")
        own = TaskManager(include_path=include_path, include_defaults=False)
    managers = [_manager(name, include_path, own) for name in names]  # all names, before any data
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for done, (name, manager) in enumerate(zip(names, managers, strict=True)):
        if progress:
            progress("load tasks", done, len(names), "")
        try:
            with redirect_stderr(io.StringIO()):  # bars of `datasets`
                loaded = manager.load([name])
        except Exception as error:  # of yaml, jinja2, datasets, the hub: all mean that it cannot be had
            raise ValueError(f"task {name!r} cannot be loaded: {_reason(error)}") from error
        for part, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE not in LIKELIHOODS:
                raise ValueError(
                    f"task {part!r} is of type {task.OUTPUT_TYPE}; measured here: {', '.join(LIKELIHOODS)}. "
                    "A saved model is a stock checkpoint, which the harness itself can run: "
                    f"lm_eval --model hf --model_args pretrained=DIR --tasks {part}"
                )
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    if progress:
        progress("load tasks", len(names), len(names), "")
    return tasks, groups


def _score(model: Any, name: str, task: Any, limit: int | None) -> tuple[dict[str, Any], Score]:
    """Evaluate one task: the harness's own row of results, and ours."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from jinja2 import TemplateError
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports]

    for metric, aggregate in list(task.aggregation().items()):
        task.aggregation()[metric] = functools.partial(_unbounded, aggregate)
    try:  # no bootstrap: it forks a pool of processes, and a mean needs none
        results: Any = evaluator.evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except (ValueError, TypeError, LookupError, AssertionError, TemplateError) as error:
        raise ValueError(f"task {name!r} cannot be evaluated: {_reason(error)}") from error
    row: dict[str, Any] = dict(results["results"][name])
    samples = results["samples"][name]
    values: dict[str, tuple[float, ...]] = {}
    for key in row:
        metric, _, kind = key.partition(",")
        seen = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
        values[key] = tuple(map(float, seen)) if all(isinstance(v, numbers.Real) for v in seen) else ()
    parts = [sample[part] for sample in samples for part in ("doc_hash", "prompt_hash", "target_hash")]
    source = Path(str((task.get_config("metadata") or {}).get("config_source", "")))
    return row, Score(
        task=name,
        version=str(task.VERSION),
        source="lm_eval" if Path(str(lm_eval.__file__)).parent in source.parents else str(source),
        shots=int(task.get_config("num_fewshot") or 0),
        documents=int(row["sample_len"]),
        truncated=model.truncated,
        metrics=_metrics(row, values),
        fingerprint=hashlib.sha256("".join(parts).encode()).hexdigest(),
    )


def _unbounded(aggregate: Callable[[Any], float], items: Any) -> float:
    """A ruined model's perplexity does not fit a float; that is no reason to stop."""
    try:
        return aggregate(items)
    except OverflowError:
        return math.inf


def _group_score(name: str, group: Any, row: Mapping[str, Any], parts: list[Score]) -> Score:
    """The harness's aggregate over the tasks of a group."""
    values = {}
    for key in row:
        metric, _, kind = key.partition(",")
        rows = [part.metrics.get(_metric_name(metric, kind)) for part in parts]
        values[key] = tuple(value for found in rows if found for value in found.values)
    return Score(
        task=name,
        version=group.version,
        source="group",
        shots=max((part.shots for part in parts), default=0),
        documents=int(row["sample_len"]),
        truncated=0,  # counted at its tasks
        metrics=_metrics(row, values),
        fingerprint=hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest(),
    )


def _metrics(row: Mapping[str, Any], values: Mapping[str, tuple[float, ...]]) -> dict[str, Metric]:
    """The entries "metric,filter" of a row of results that are numbers."""
    found = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, numbers.Real):
            error = mean_error(float(value), values[key])
            found[_metric_name(metric, kind)] = Metric(float(value), error, values[key])
    return found


def _metric_name(metric: str, kind: str) -> str:
    return metric if kind in ("", "none") else f"{metric} ({kind})"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice and the bars of the harness off the terminal: what matters of them is in the scores."""
    from lm_eval.api import task  # pyright: ignore[reportMissingImports]

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    module: Any = task
    bar = module.tqdm
    try:
        module.tqdm = lambda documents, **_: documents  # the one bar that no argument turns off
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
