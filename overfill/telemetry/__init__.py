"""What a process tells people: metrics, logs, traces, progress."""
