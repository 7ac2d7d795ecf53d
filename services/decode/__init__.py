"""The decode worker process: one RPC carries all sequences of one router."""
