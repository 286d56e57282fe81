"""Processes, folders, object stores, checkpoints and progress reports."""
