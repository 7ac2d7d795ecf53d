"""Load without a model: traces of arrivals and lengths, for benchmarks, load tests and simulation. No torch."""
