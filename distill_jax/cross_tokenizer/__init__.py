"""Targets in another tokenizer's tokens: two tokenizers over the bytes of the same text.

Vocabularies: vocabulary.py has the bytes of a tokenizer's ids, roles.py matches the tokens without
bytes, tables.py has what a pair of vocabularies needs, and sides.py makes both from a config.

Alignment: align.py puts the tokens of both on one axis of bytes, chats.py (with chat_markers.py)
those of chats by their turns. rows.py makes student rows of the rows of a store, whose length
student_lengths.py chooses, and student_texts.py the teacher's rows of texts that a student wrote.
statistics.py has the counts, and summary.py writes those of a store.

Targets: project.py (with weights.py) projects sampled distributions, on the host. dense.py (with
chains.py and dense_targets.py) projects whole distributions, on the devices. spans.py has the
log-probabilities of spans of the text.
"""
