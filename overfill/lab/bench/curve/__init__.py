"""``overfill bench curve``: throughput against interactivity at an equal number of cores, beside vLLM."""
