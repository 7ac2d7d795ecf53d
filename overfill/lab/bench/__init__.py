"""Benchmarks of the engine, the handoff, the router and whole servers, each beside its bound and its peers.

A package per verb of ``overfill bench``:

- ``engine``: ``decode`` and ``prefill``, our engine and vLLM against the limits of this machine.
- ``handoff``: ``handoff``, what a handoff costs a request.
- ``router``: ``router``, what the router costs.
- ``serve``: ``serve``, latency and throughput of servers under load.
- ``vllm``: ``vllm``, both stages on vLLM beside plain vLLM.

A *bound* is a limit that a value is compared with. A *peer* is something else that does the same work in the same run:
another engine, a bare gRPC server, a plain prefill.
"""
