"""Breaks a running stack, again and again, under load, and judges every answer.

``strikes`` says what befalls whom, ``trial`` runs it on a stack of its own, ``probes`` tells where a request is,
``faults`` does the harm, ``load`` asks, ``watch`` looks at the processes' memory, ``report`` tells.
"""
