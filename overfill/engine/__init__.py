"""Schedules prefill and decode steps: tokens in, tokens out; no sockets and no text."""
