"""Trains a decoder on its full model: two-stage forward pass, loss, and resumable runs."""
