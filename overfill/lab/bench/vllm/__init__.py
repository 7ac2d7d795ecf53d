"""OverFill's two stages on vLLM beside plain vLLM: decode, first token and handoff, in one run."""
