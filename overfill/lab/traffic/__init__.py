"""The load generator: traces of requests, servers under load, outcomes, and the objectives that a run must meet."""
