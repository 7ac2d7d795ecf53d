"""Checks dashboards and rules against a real Prometheus."""
