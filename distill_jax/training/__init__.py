"""The train step, its state, the loop around it, and what the loop reads and writes."""
