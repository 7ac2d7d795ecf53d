"""Locust file for ``locust -f loadtest/locustfile.py``: users of ``overfill.lab.loadtest.users`` and their options."""

from locust import events

from overfill.lab.loadtest.users import GrpcUser, OpenAiUser, add_options, choose_user

__all__ = ["GrpcUser", "OpenAiUser"]

events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(choose_user)
