"""Decode and prefill speed of our engine, beside the bound that this machine sets."""
