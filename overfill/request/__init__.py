"""Request parameters, grammars and the names of enum values, as the wire carries them. No torch."""
