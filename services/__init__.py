"""The runnable services: thin processes around the library, which never import each other."""
