"""Deploys, finds and scales a stack on Ray Serve; tokens and KV never pass through it.

Only the modules that talk to a cluster import Ray; the rest is data. The replicas are in ``services/ray``.
"""
