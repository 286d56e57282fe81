"""Pruning for `shrink`: sizes of a student, importance of a model's parts, selection, cutting."""
