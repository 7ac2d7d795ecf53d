"""Finds full models, builds and caches pairs, and runs a pair in one process (``overfill.LLM``)."""
