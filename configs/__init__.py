"""Ready-to-run YAML for every command."""
