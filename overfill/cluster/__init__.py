"""Describes, deploys, finds and scales a stack on Ray Serve; tokens and KV never pass through it.

Only ``session`` and ``directory`` import Ray; the rest is data. The replicas are in ``services/ray``.
"""
