"""Targets in another tokenizer's tokens: two tokenizers over the bytes of the same text.

vocabulary.py has the bytes of a tokenizer's ids, roles.py matches the tokens without bytes,
chats.py the turns of chats.
"""
