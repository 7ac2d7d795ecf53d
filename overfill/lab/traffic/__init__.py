"""Traces of requests, their outcomes, and the objectives that a run must meet."""
