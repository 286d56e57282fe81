"""The loss that rounding a student costs, the width of each tensor of a file, and drafts."""
