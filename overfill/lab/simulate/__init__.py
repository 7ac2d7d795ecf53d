"""Simulates a stack: the router's own decisions over modelled workers, in virtual time.

No sockets and no torch.
"""
