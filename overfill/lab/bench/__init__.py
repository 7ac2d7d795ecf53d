"""Benchmarks of the engine, the router and whole servers, each beside its bound and its peers.

A package per verb of ``overfill bench``:

- ``curve``: ``curve``, throughput against interactivity of whole servers.
- ``engine``: ``decode`` and ``prefill``, our engine against the limits of this machine.
- ``router``: ``router``, what the router costs.
- ``vllm``: ``vllm``, both stages on vLLM beside plain vLLM.

A *bound* is a limit that a value is compared with. A *peer* is something else that does the same work in the same run:
another engine, another project's router, a bare server.
"""
