"""For ``locust -f loadtest/locustfile.py``: the users, shapes and objectives of ``overfill.lab.loadtest``."""

from overfill.lab.loadtest.locustfile import GrpcUser, OpenAiUser, PlannedShape

__all__ = ["GrpcUser", "OpenAiUser", "PlannedShape"]
