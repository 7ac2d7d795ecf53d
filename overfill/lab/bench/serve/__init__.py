"""Puts the same load on one or more servers, and compares what clients see.

Torch is imported only to start an engine.
"""
