"""Puts the same load on one or more servers, and compares what clients see. No torch."""
