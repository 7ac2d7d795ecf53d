"""Metrics, logs, traces and progress of a process."""
