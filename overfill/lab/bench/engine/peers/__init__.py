"""vLLM as a peer, in an environment of its own: an engine stepped over pipes, and vLLM's server."""
