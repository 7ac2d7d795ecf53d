"""The services as deployments of Ray Serve. Only this package imports all four services."""
