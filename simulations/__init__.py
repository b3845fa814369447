"""Many virtual sites on one machine, phantoms, baselines."""
