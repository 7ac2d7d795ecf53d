"""One vLLM engine of two ranks in this process: its tokens, its KV's place, its agreement and its end."""
