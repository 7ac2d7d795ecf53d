"""Settings of the services, from flags, environment variables and a YAML or TOML file."""
