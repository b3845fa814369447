"""The site's half of each algorithm."""
