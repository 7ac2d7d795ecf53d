"""The cost of one handoff: a request beside a plain prefill, and the timeline of a single transfer."""
