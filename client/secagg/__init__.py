"""The site's half of MSA-1, one file a phase."""
