"""What a request may ask for and how the wire names it: parameters, grammars, enumerations."""
