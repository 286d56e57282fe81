"""The report of a run: its results, a headline, the HTML page and the model card."""
