"""The cost of the router, beside a bare gRPC server, with mock workers behind it."""
