"""The server's half of MSA-1, one file a phase."""
