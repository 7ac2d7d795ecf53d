"""Judges pairs: agreement and likelihood, free-running answers, plain quantisation, lm-eval."""
