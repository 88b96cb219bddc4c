"""/metrics: counters and timings of serving, for Prometheus.

IS: a status as the text that Prometheus reads. IS NOT: the counting (meters).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from flashrt.serve.core import Status
from flashrt.serve.meters import BOUNDS_S, Histogram

_COUNTED = (
    ("asks", "requests", "Requests that were taken"),
    ("refused", "requests_refused", "Requests turned away: the queue was full"),
    ("failed", "requests_failed", "Requests that ended by an error"),
    ("cancelled", "requests_cancelled", "Requests whose client went away"),
    ("timed_out", "requests_timed_out", "Requests that took too long"),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts"),
    ("cached_tokens", "cached_tokens", "Tokens of prompts that were not fed to the model"),
    ("generated_tokens", "generated_tokens", "Tokens that were sampled"),
    ("steps", "steps", "Replays of the model"),
)
_TIMED = (
    ("wait", "queue_seconds", "From the request to a lane"),
    ("first_token", "first_token_seconds", "From the request to its first token"),
    ("next_token", "next_token_seconds", "Between tokens"),
)


class _Collector:
    """What prometheus_client asks for metrics."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        status = self._status
        for field, name, words in _COUNTED:
            yield CounterMetricFamily(f"flashrt_{name}", words, getattr(status.meters, field))
        for field, name, words in _TIMED:
            yield _histogram(f"flashrt_{name}", words, getattr(status.meters, field))
        lanes = GaugeMetricFamily("flashrt_lanes", "Lanes by what they do", labels=["state"])
        states = [lane.state for lane in status.lanes]
        for state in ("idle", "prompt", "decode", "end"):
            lanes.add_metric([state], states.count(state))
        yield lanes
        waiting = sum(status.queued.values())
        yield GaugeMetricFamily("flashrt_queue_length", "Choices that wait for a lane", waiting)
        entries = GaugeMetricFamily("flashrt_capsules", "Capsules by tier", labels=["tier"])
        nbytes = GaugeMetricFamily("flashrt_capsule_bytes", "Their bytes", labels=["tier"])
        for tier, (count, size) in status.capsules.items():
            entries.add_metric([tier], count)
            nbytes.add_metric([tier], size)
        yield entries
        yield nbytes
        evicted = CounterMetricFamily("flashrt_evictions", "Capsules that gave way", labels=["to"])
        for where, count in status.evictions.items():
            evicted.add_metric([where], count)
        yield evicted
        yield from _of_images(status)
        yield GaugeMetricFamily("flashrt_pool_bytes", "Room for capsules", status.pool_nbytes)
        used = status.pool_used_nbytes
        yield GaugeMetricFamily("flashrt_pool_used_bytes", "Room that is taken", used)


def _of_images(status: Status) -> Iterator[Metric]:
    """Of a model that sees."""
    counted = status.images
    if counted is None:
        return
    for name, words, value in (
        ("images", "Images in requests, those of earlier turns included", counted.shown),
        ("images_decoded", "Those whose files were not known", counted.decoded),
        ("images_seen", "Runs of the vision tower", counted.seen),
        ("tower_seconds", "What they took", counted.seen_s),
    ):
        yield CounterMetricFamily(f"flashrt_{name}", words, value)
    words = "Rows of images that are kept in host memory"
    yield GaugeMetricFamily("flashrt_image_bytes", words, status.images_nbytes)


def _histogram(name: str, words: str, found: Histogram) -> Metric:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], found.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, words, buckets=buckets, sum_value=found.sum_s)


def metrics_text(status: Status) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return generate_latest(registry)
