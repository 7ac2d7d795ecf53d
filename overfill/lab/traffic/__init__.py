"""Requests that are sent and what became of them: traces, outcomes and objectives."""
