"""The cost of the router, beside other projects' routers and a bare HTTP server."""
