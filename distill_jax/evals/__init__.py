"""One benchmark set a file; the folder is the registry.

A set is a module with a frozen dataclass `Set` whose fields are its config keys:

  files(): the files that it is read from, here or in an installed package; never downloaded.
  question(row, number): a row of them as the model is asked it: a `_set.Choice`, or, for
    answers in words, the line of a prompts.jsonl: `prompt` and what the judge reads.
  judge(): the filter (distill_jax/filters) that says which answers are right; None for
    choices, which are taken by log-likelihood.

Modules whose names begin with "_" are how they are measured.
"""

SHARED = (
  "generative",
  "heldout",
  "likelihood",
  "lm_eval",
  "model_slot",
  "multiple_choice",
  "next_token",
  "questions",
  "retrieval",
  "similarity",
)
