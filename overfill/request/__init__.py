"""Parameters and grammars that a request may carry, and the names of the wire's enumerations."""
