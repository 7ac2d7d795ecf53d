"""vLLM as an engine. Only ``engine.load`` imports it, in a worker that was told to use it."""
