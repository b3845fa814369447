"""MSA-1 at the coordinator: one file a phase, the round that drives them, the store that outlives a crash."""
