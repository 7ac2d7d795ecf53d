"""Decode and prefill speed of our engine and of other engines, beside the bound that this machine sets."""
