"""The special tokens of published vocabularies by their role, in order of preference."""

# The end of a document precedes the end of a turn, since packing separates documents.
EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>")
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")
TURN_START = "<|im_start|>"  # which some tokenizer_config.json name as their BOS
