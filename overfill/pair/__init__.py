"""Finds pairs, judges their answers, and runs a pair in one process (``overfill.LLM``)."""
