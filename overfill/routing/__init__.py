"""Decides which worker serves a request, which requests wait, and how many workers a pool needs."""
