"""A new vocabulary for a model: embedding and head for another tokenizer, from the old rows."""
