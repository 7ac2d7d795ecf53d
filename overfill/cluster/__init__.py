"""A stack on Ray Serve: what it consists of, how it is deployed, found and scaled. Tokens and KV never pass here.

Only ``connection`` and ``directory`` import Ray; the rest is data. The replicas are ``services/ray``.
"""
