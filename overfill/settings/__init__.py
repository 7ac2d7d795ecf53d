"""Settings of the services: files, variables, flags."""
