"""Exact clipped gradients of every unit of a batch in one backward pass."""
