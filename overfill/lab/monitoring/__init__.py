"""Holds dashboards and rules against a real Prometheus."""
