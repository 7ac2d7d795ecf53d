"""Other projects' servers and tools, each in an environment of its own: vLLM, load generators, routers."""
