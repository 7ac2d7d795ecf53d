"""Load on anything that serves: arrivals in, times of tokens out. No torch."""
