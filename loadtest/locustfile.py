"""Locust file for ``locust -f loadtest/locustfile.py``: exports users and load shapes of ``overfill.lab.loadtest``."""

from overfill.lab.loadtest.locustfile import GrpcUser, OpenAiUser, PlannedShape

__all__ = ["GrpcUser", "OpenAiUser", "PlannedShape"]
