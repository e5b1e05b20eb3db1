"""What the server counts and times, in Prometheus' text form."""

import time
from collections.abc import Iterator

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  ProcessCollector,
  generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bis_jax.scoring.prefix_cache import PrefixCache

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class _CacheMetrics(Collector):
  """The counts of a cache of prefixes."""

  def __init__(self, cache: PrefixCache):
    self._cache = cache

  def collect(self) -> Iterator[Metric]:
    counts = self._cache.counts()
    yield GaugeMetricFamily("bis_jax_cached_tokens", "Tokens in the cache", counts["tokens"])
    yield CounterMetricFamily(
      "bis_jax_reused_tokens", "Tokens taken from the cache", counts["reused_tokens"]
    )
    for name in ("hits", "misses", "evicted"):
      yield CounterMetricFamily(
        f"bis_jax_cache_{name}", f"{name.capitalize()} of the cache", counts[name]
      )


class ServerMetrics:
  """The metrics of one application; `watched` adds those of its requests."""

  def __init__(self, cache: PrefixCache | None = None):
    self._registry = CollectorRegistry()
    if cache:
      self._registry.register(_CacheMetrics(cache))
    ProcessCollector(registry=self._registry)
    self._requests = Counter(
      "bis_jax_requests", "Requests answered", ("path", "status"), registry=self._registry
    )
    self._seconds = Histogram(
      "bis_jax_request_seconds",
      "Seconds from a request's head to its answer",
      ("path",),
      buckets=_SECONDS,
      registry=self._registry,
    )
    self.held = Gauge("bis_jax_held_requests", "Requests held", registry=self._registry)
    self.queue = Gauge(
      "bis_jax_queued_solutions", "Solutions waiting for the device", registry=self._registry
    )
    self.batch_fill = Histogram(
      "bis_jax_batch_fill",
      "Solutions of a batch, as a share of --batch",
      buckets=[i / 10 for i in range(1, 11)],
      registry=self._registry,
    )
    self.batch_seconds = Histogram(
      "bis_jax_batch_seconds", "Seconds of a batch", buckets=_SECONDS, registry=self._registry
    )

  def text(self) -> bytes:
    return generate_latest(self._registry)

  def watched(self, app: ASGIApp, paths: set[str]) -> ASGIApp:
    """Returns `app`, whose requests are counted and timed; other paths are all called "other"."""

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
      if scope["type"] != "http":
        await app(scope, receive, send)
        return
      path, start = scope["path"] if scope["path"] in paths else "other", time.perf_counter()

      async def count(message: Message) -> None:
        if message["type"] == "http.response.start":
          self._requests.labels(path, str(message["status"])).inc()
          self._seconds.labels(path).observe(time.perf_counter() - start)
        await send(message)

      await app(scope, receive, count)

    return watch
