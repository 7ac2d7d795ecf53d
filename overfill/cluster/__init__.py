"""A stack on Ray Serve: its specification, deployment, directory of routers, and scaling. Carries no tokens and no KV.

Only ``connection`` and ``directory`` import Ray; the other modules are plain data and arithmetic. ``services/ray`` has
the replicas.
"""
