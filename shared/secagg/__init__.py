"""Secure-aggregation primitives both sides share (MSA-1)."""
