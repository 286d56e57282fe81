"""The loss that rounding a student costs, and the width of each tensor of its file."""
