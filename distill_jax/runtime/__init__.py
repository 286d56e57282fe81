"""Processes, folders, object stores, checkpoints and progress: what surrounds the mathematics."""
