"""Plays loads on servers and records when tokens arrive. Modules import torch only when they start an engine."""
