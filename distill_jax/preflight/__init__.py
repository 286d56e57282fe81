"""Predictions of the memory, speed and cost of a run on TPU slices that are not available here."""
