"""Benchmarks of the engine, the KV handoff and the router, each beside its bound and its peers."""
