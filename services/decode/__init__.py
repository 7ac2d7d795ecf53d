"""The decode worker process: one RPC is one attempt at one sequence."""
