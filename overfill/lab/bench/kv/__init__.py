"""The rate at which KV moves between two processes, beside a raw gRPC stream."""
