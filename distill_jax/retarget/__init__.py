"""Conversion of records to another tokenizer, on the host; see `job`."""
