"""The Grafana dashboards: one module each, listed in ``BOARDS``."""

from __future__ import annotations

from boards.capacity import capacity
from boards.handoff import handoff
from boards.latency import latency
from boards.overview import overview
from boards.router import router
from boards.stages import stages
from boards.tiers import tiers

BOARDS = {make.__name__: make for make in (overview, latency, tiers, stages, handoff, router, capacity)}
"""Name of the file -> function that builds the dashboard."""
