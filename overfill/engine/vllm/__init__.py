"""vLLM as an engine. Only a worker that was told to use it imports this package."""
