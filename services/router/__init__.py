"""The router process: the public API, text and tokens, and one relay per answer."""
