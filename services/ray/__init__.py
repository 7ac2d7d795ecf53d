"""The services as deployments of Ray Serve; the only package that imports all three."""
