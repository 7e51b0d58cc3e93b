"""Figures of one worker process in Prometheus' text format."""

from __future__ import annotations

from collections import Counter, defaultdict

from service.worker import Worker

KIND = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts answers. All other figures are read from the worker when they are requested."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; `path` must be one of a few."""
        self.answers[path, status] += 1
        self.seconds[path] += seconds

    def text(self, worker: Worker) -> str:
        """Return all figures."""
        engine = worker.engine
        lines = [
            "# HELP service_request_seconds Time until an answer was complete.",
            "# TYPE service_request_seconds summary",
        ]
        for path, seconds in sorted(self.seconds.items()):
            count = sum(n for (p, _), n in self.answers.items() if p == path)
            lines += [f'service_request_seconds_sum{{path="{path}"}} {seconds:.6f}']
            lines += [f'service_request_seconds_count{{path="{path}"}} {count}']
        lines += ["# HELP service_answers_total Answers by status.", "# TYPE service_answers_total counter"]
        for (path, status), count in sorted(self.answers.items()):
            lines += [f'service_answers_total{{path="{path}",status="{status}"}} {count}']
        for name, kind, meaning, value in (
            ("steps_total", "counter", "Steps of the batch that generates.", engine.steps),
            ("generated_tokens_total", "counter", "Tokens of all steps.", engine.rows),
            ("shared_tokens_total", "counter", "Tokens of prompts that were shared, not computed.", engine.shared),
            ("embedded_tokens_total", "counter", "Tokens of embedded texts.", worker.embedded_tokens),
            ("cut_texts_total", "counter", "Texts that were longer than the model reads.", worker.cut_texts),
            ("running", "gauge", "Requests in the batch.", len(engine.running)),
            ("waiting", "gauge", "Requests that wait.", len(engine.waiting) + len(worker.jobs)),
            ("free_pages", "gauge", "Pages of the caches that are free.", engine.caches[0].num_free_pages),
        ):
            lines += [f"# HELP service_{name} {meaning}", f"# TYPE service_{name} {kind}", f"service_{name} {value}"]
        return "\n".join(lines) + "\n"
