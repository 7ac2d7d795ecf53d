"""Makes pairs: downloads full models, prunes, fits, imports, trains and evaluates decoders. No service imports it."""
