"""Load on one or more servers: when requests arrive goes in, when tokens arrived comes out. No torch at import."""
