"""Tools that put faults into services and between them."""
