"""MSA-1 at the site: one file a phase, the session that leads through them, the journal that outlives a crash."""
