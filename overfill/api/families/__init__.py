"""Formats in which families of models write tool calls: a module each, and what they share."""
