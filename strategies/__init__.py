"""How updates become a model: one file an algorithm."""
