"""The ``overfill`` command: runs stacks, queries them, and builds and judges pairs."""
