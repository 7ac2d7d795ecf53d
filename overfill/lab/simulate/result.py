"""Result of a simulated run. Figures have the names of ``overfill bench serve`` where they are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.request import Counters, SimRequest, Snapshot
from overfill.lab.traffic.outcome import Objective
from overfill.request.names import cached_by_source

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Result of one run.

    Attributes:
        requests: All requests, in order of arrival.
        samples: Snapshots of the stack over time.
        gaps: Seconds between successive tokens, over all answers. A request's ``itl`` is the mean of its own gaps.
    """

    profile: Profile
    options: SimulationOptions
    requests: Sequence[SimRequest]
    samples: Sequence[Snapshot]
    gaps: Histogram
    counters: Counters

    def met(self, objective: Objective) -> list[SimRequest]:
        """Returns the requests that were answered within the objective."""
        return [request for request in self.requests if self.meets(request, objective)]

    def meets(self, request: SimRequest, objective: Objective) -> bool:
        """Returns True if the request meets the objective of the tier that it asks for, or else ``objective``."""
        return request.meets(self._objectives(objective).get(request.asked, objective))

    def _objectives(self, objective: Objective) -> dict[str, Objective]:
        return {tier.name: tier.objective(objective) for tier in self.options.tiers}

    def attainment(self, objective: Objective) -> float:
        """Returns the share of all requests that meet the objective."""
        return len(self.met(objective)) / max(1, len(self.requests))

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last token."""
        return max((r.last for r in self.requests if r.last is not None), default=0.0)

    @property
    def worker_hours(self) -> float:
        return self.counters.worker_seconds / 3600

    def figures(self, objective: Objective | None) -> dict[str, float | None]:
        """Returns name -> figure: seconds, fractions, or requests and tokens per second. None means no value."""
        done = [request for request in self.requests if request.ok]
        counters, span = self.counters, self.span
        found: dict[str, float | None] = {}
        for name, values in (
            ("ttft", [request.ttft for request in done]),
            ("request_itl", [request.itl for request in done if request.trace.output_tokens > 1]),
            ("e2e", [request.e2e for request in done]),
        ):
            marks = np.percentile(values, PERCENTILES) if values else [None] * len(PERCENTILES)
            for percentile, mark in zip(PERCENTILES, marks, strict=True):
                found[f"{name}_p{percentile}"] = None if mark is None else float(mark)
        for percentile in PERCENTILES:
            found[f"itl_p{percentile}"] = self.gaps.percentile(percentile / 100)
        found |= {
            "requests": float(len(self.requests)),
            "failed": float(len(self.requests) - len(done)),
            "request_rate": len(done) / span if span else None,
            "output_tokens": sum(r.trace.output_tokens for r in done) / span if span else None,
            "cached": _share(counters.cached_tokens, counters.prompt_tokens),
            **{
                f"cached_{source}": _share(tokens, counters.prompt_tokens)
                for source, tokens in cached_by_source(counters).items()
            },
            "computed_per_new": _share(counters.prompt_tokens - counters.cached_tokens, counters.new_tokens),
            "local": _share(counters.local_prompts, counters.prompts),
            "prefill_utilisation": _share(counters.prefill_busy, counters.prefill_worker_seconds),
            "decode_utilisation": _share(counters.decode_busy, counters.decode_worker_seconds),
            "worker_hours": self.worker_hours,
            "refusals": float(counters.refusals),
            "preemptions": float(counters.preemptions),
            "migrations": float(counters.migrations),
            "failures": float(counters.failures),
            "decision_us": 1e6 * counters.decision_seconds / counters.decisions if counters.decisions else None,
            "report_us": 1e6 * counters.report_seconds / counters.reports if counters.reports else None,
            "requests_per_cpu_minute": 60 * len(self.requests) / counters.cpu_seconds if counters.cpu_seconds else None,
        }
        if objective is not None:
            found["attainment"] = self.attainment(objective)
            found["goodput"] = len(self.met(objective)) / span if span else None
        return found

    def tier_figures(self, objective: Objective) -> dict[str, dict[str, float | None]]:
        """Returns tier -> name -> figure.

        ``requests``, ``attainment``, ``refused``, ``failed`` and ``browned_out`` are of the requests that ask for the
        tier; ``answers``, ``answer_share``, ``ttft_p95`` and ``request_itl_p95`` of the answers that it wrote.
        """
        answers = [request for request in self.requests if request.ok]
        found: dict[str, dict[str, float | None]] = {}
        for tier in self.options.all_tiers(self.profile):
            asking = [request for request in self.requests if request.asked == tier.name]
            wrote = [request for request in answers if request.job.tier == tier.name]
            itl = [request.itl for request in wrote if request.trace.output_tokens > 1]
            refused = sum(request.error == "Overloaded" for request in asking)
            found[tier.name] = {
                "requests": float(len(asking)),
                "attainment": _share(sum(self.meets(request, objective) for request in asking), len(asking)),
                "refused": float(refused),
                "failed": float(sum(bool(request.error) for request in asking) - refused),
                "browned_out": float(sum(request.ok and request.job.tier != tier.name for request in asking)),
                "answers": float(len(wrote)),
                "answer_share": _share(len(wrote), len(answers)),
                "ttft_p95": float(np.percentile([request.ttft for request in wrote], 95)) if wrote else None,
                "request_itl_p95": float(np.percentile(itl, 95)) if itl else None,
            }
        return found

    def to_json(self, objective: Objective | None) -> dict[str, Any]:
        """Returns the document for ``--json``: settings, figures, errors, and the timeline."""
        options = self.options
        return {
            "profile": self.profile.name,
            "profile_source": self.profile.source,
            "policy": options.policy,
            "kv_peers": options.kv_peers,
            "kv_disk_size": options.kv_disk_size,
            "prefill": options.prefill,
            "decode": options.decode,
            "colocated": options.colocated,
            "autoscale": options.scaling is not None,
            "objective": None if objective is None else str(objective),
            "brownout": list(options.brownout),
            "figures": self.figures(objective),
            "tiers": None if objective is None else self.tier_figures(objective),
            "errors": dict(Counter(request.error for request in self.requests if request.error)),
            "counters": asdict(self.counters),
            "samples": [asdict(sample) for sample in self.samples],
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
