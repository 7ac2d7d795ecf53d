"""Tensor parallelism on vLLM: a worker's ranks, each with its share of the KV heads, and the worker's link to them."""
