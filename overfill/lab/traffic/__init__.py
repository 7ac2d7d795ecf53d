"""Traces of requests, their OpenAI messages, their outcomes, and the objectives that a run must meet."""
