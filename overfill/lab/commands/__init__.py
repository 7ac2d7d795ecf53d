"""The commands of the lab: ``overfill bench``, ``chaos``, ``loadtest``, ``simulate``."""
