"""Measures stacks and breaks them; nothing that serves imports this package."""
