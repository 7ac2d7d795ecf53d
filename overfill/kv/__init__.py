"""The paged KV cache, its prefix cache, and the transfer of KV from prefill to decode workers."""
