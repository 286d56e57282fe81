"""Whether a run fits a slice that is not here, how fast it can be, and what it costs."""
