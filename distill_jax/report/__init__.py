"""The report of a run: its numbers, the sentence they support, one HTML page, the model card."""
