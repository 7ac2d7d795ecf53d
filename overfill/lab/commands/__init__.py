"""The lab's commands: ``overfill bench``, ``chaos``, ``loadtest`` and ``simulate``."""
