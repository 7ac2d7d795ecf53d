"""Runs the expressions of dashboards and rules against a real Prometheus."""
