"""Breaks a running stack under load, at a chosen phase of a request, and judges every answer.

``strikes`` chooses faults and moments, ``trial`` runs them on a stack of its own, ``probes`` tells where a request is,
``faults`` injects them, ``load`` sends requests, ``watch`` samples the processes' memory, ``report`` prints the result.
"""
