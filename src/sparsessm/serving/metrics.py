"""Counts and times for Prometheus.

Place in the flow: `gate.py` tells it every answer, the scheduler's own counts are read when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .answers import Answer
from .scheduler import Scheduler
from .watching import Monitor

ROUTES = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/watch"}
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one server; a registry of its own, so that two in one process do not meet."""

    def __init__(self, scheduler: Scheduler, monitor: Monitor | None = None) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "sparsessm_requests", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self._first = Histogram(
            "sparsessm_time_to_first_token_seconds",
            "From the request to its first piece of text.",
            buckets=FIRST,
            registry=self.registry,
        )
        self._each = Histogram(
            "sparsessm_time_per_token_seconds",
            "From the first piece of an answer to its end, for each token of a sequence after its first.",
            buckets=EACH,
            registry=self.registry,
        )
        self.registry.register(_Engine(scheduler, monitor))

    def answered(self, path: str, status: int) -> None:
        """A request was answered, or left (499)."""
        self._answers.labels(path if path in ROUTES else "other", str(status)).inc()

    def timed(self, answer: Answer) -> None:
        """An answer is complete."""
        if answer.first:
            self._first.observe(answer.first - answer.begun)
        if (more := answer.new_tokens - answer.choices) > 0:
            self._each.observe((time.perf_counter() - answer.first) * answer.choices / more)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """What the scheduler has counted."""

    def __init__(self, scheduler: Scheduler, monitor: Monitor | None) -> None:
        self._scheduler, self._monitor = scheduler, monitor

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks for it."""
        counts, load = self._scheduler.counts, self._scheduler.load()
        told = {
            "prompt_tokens": "Tokens of prompts, those from kept states included.",
            "cached_tokens": "Tokens of prompts that came from kept states.",
            "new_tokens": "Tokens that were generated.",
            "steps": "Steps of the running batch.",
            "lookups": "Prompts that kept states were looked up for.",
            "hits": "Prompts that a kept state was found for.",
        }
        for name, text in told.items():
            yield CounterMetricFamily(f"sparsessm_{name}", text, value=getattr(counts, name))
        gauges = {
            "waiting": "Requests that wait or whose prompts are being read.",
            "running": "Sequences in the batch.",
            "kept": "Kept states.",
            "kept_bytes": "Bytes of kept states.",
        }
        for name, text in gauges.items():
            yield GaugeMetricFamily(f"sparsessm_{name}", text, value=load[name])
        if self._monitor is not None:
            found = self._monitor.record()
            yield CounterMetricFamily("sparsessm_drift_prompts", "Prompts watched.", value=found["prompts"])
            yield CounterMetricFamily("sparsessm_drift_alarms", "Alarms of drift.", value=found["alarms"])
            scores = GaugeMetricFamily(
                "sparsessm_drift_score",
                "How strange the last prompts are; 1 is the threshold.",
                labels=["block"],
            )
            for block, judged in found["blocks"].items():
                scores.add_metric([block], judged["score"])
            yield scores
