"""What the engine counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one engine, in a registry of their own."""

    def __init__(self) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests_total", "HTTP requests by endpoint and status.", "path", "status")
        self.answered = self._counter("answered_total", "Requests by the pack that answers them.", "pack")
        self.read = self._counter("prompt_tokens_total", "Tokens of prompts that were read.")
        self.written = self._counter("generated_tokens_total", "Tokens that were written.")
        self.first = self._histogram("first_token_seconds", "From a request's arrival to its first token.")
        self.step = self._histogram("step_seconds", "One step: a token for every running choice.")
        self.routing = self._histogram("routing_seconds", "The router's time for one prompt.")
        self.waiting = self._gauge("waiting_choices", "Choices in the queue.")
        self.running = self._gauge("running_choices", "Choices being written.")
        self.packs = self._gauge("packs", "Packs that can be asked for.")
        self.memory = self._gauge("pack_memory_bytes", "What decoded packs take.")

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"graftllm_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"graftllm_{name}", about, buckets=_SECONDS, registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"graftllm_{name}", about, registry=self._registry)
