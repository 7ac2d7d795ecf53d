"""Output for people who run a stack: metrics, logs, traces and progress."""
