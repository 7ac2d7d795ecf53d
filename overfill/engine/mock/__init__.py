"""An engine that waits instead of computing: it plays scripts, and its KV says which prompt it belongs to. No torch."""
