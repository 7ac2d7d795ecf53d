"""The runnable services: thin processes around the library. Only ``colocated`` and ``ray`` import other services."""
