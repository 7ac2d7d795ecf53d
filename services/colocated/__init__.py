"""The colocated worker process: it computes a prompt and writes the answer on KV that it copies in memory."""
