"""The runnable services: thin processes around the library. Only ``worker`` and ``ray`` import other services."""
