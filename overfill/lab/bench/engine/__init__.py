"""Decode and prefill speed of our engine, beside vLLM and the bound that this machine sets."""
