"""The cost of the router, beside bare gRPC and HTTP servers, with mock workers behind it."""
