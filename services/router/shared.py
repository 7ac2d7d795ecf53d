"""What the cores of all revisions share in a router."""

from __future__ import annotations

from dataclasses import dataclass, field

from overfill.routing.admission import KeyLimiter
from overfill.routing.rolling_stats import RollingStats
from overfill.routing.session_stats import SessionStats
from overfill.routing.stream import GrpcConnector
from overfill.telemetry.router_metrics import RouterMetrics
from services.router.bounded_executor import BoundedExecutor
from services.router.limits import RequestLimits
from services.router.open_requests import OpenRequests
from services.router.pace import Pace


@dataclass(frozen=True, slots=True)
class Shared:
    """Connections, quotas, limits, threads and statistics of one router process.

    Attributes:
        connector: connections to the workers.
        requests: the requests that are not over.
        limits: what one request may take.
        rolling: statistics of the last minute.
        sessions: statistics of the sessions that were active lately.
        pace: decides when streams write.
        executor: threads for long requests.
        grammar_executor: threads for short requests with a grammar, which do not wait for long ones.
    """

    connector: GrpcConnector
    metrics: RouterMetrics
    requests: OpenRequests = field(default_factory=lambda: OpenRequests(KeyLimiter()))
    limits: RequestLimits = field(default_factory=RequestLimits)
    rolling: RollingStats = field(default_factory=RollingStats)
    sessions: SessionStats = field(default_factory=SessionStats)
    pace: Pace = field(default_factory=Pace)
    executor: BoundedExecutor = field(default_factory=BoundedExecutor)
    grammar_executor: BoundedExecutor = field(default_factory=BoundedExecutor)
