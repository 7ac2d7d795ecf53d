"""The services as deployments of Ray Serve. The one place that knows all three of them."""
