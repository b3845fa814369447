"""Differentially private training and the site's ledger."""
