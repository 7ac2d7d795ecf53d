"""The prefill worker process: one RPC is one lease on one prompt's KV."""
