"""OverFill's two stages on vLLM beside plain vLLM, in one run: decode, first token, handoff, and the host's work."""
