"""gRPC as this system uses it: channels, TLS, servers, and errors to status and back. No torch."""
