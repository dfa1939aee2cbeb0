"""``GET /metrics``: the engine's counters in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from trtkit.runtime.api import EngineStats

__all__ = ["exposition"]


def exposition(stats: EngineStats, unfinished: int) -> tuple[bytes, str]:
    """(text, content type) of ``stats`` and of the ``unfinished`` requests. Counters start anew with the engine."""
    registry = CollectorRegistry()
    registry.register(_Engine(stats, unfinished))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Engine:
    """One look at the engine, as a collector."""

    def __init__(self, stats: EngineStats, unfinished: int) -> None:
        self._stats = stats
        self._unfinished = unfinished

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        for name, text, value in (
            ("steps", "Decode steps", stats.steps),
            ("prompt_tokens", "Prompt tokens asked for", stats.prompt_tokens),
            ("prefill_tokens", "Prompt tokens computed; the rest was there", stats.prefill_tokens),
            ("generated_tokens", "Tokens generated", stats.new_tokens),
            ("row_steps", "Rows of all decode steps; drafting lowers them", stats.row_steps),
            ("preemptions", "Rows that had to make room and were computed again", stats.preemptions),
        ):  # fmt: skip
            yield CounterMetricFamily(f"trtkit_{name}", text, value=value)
        accepted = CounterMetricFamily(
            "trtkit_accepted_row_steps", "Row-steps that accepted at least so many drafted tokens", labels=["depth"]
        )
        for depth, count in enumerate(stats.accepted_by_depth, start=1):
            accepted.add_metric([str(depth)], count)
        yield accepted
        phases = CounterMetricFamily("trtkit_phase_seconds", "Time spent by phase", labels=["phase"])
        for phase, seconds in stats.seconds.items():
            phases.add_metric([phase], seconds)
        yield phases
        yield GaugeMetricFamily("trtkit_unfinished_rows", "Samples that run or wait", value=self._unfinished)
        yield GaugeMetricFamily("trtkit_kv_blocks", "Blocks of the KV cache", value=stats.kv_blocks)
        yield GaugeMetricFamily("trtkit_kv_blocks_free", "Free blocks of the KV cache", value=stats.kv_blocks_free)
