"""One loss a file; the folder is the registry.

A loss is a module with a frozen dataclass `Loss` whose fields are its config keys, `weight`
(a Schedule) among them. There are two kinds:

  token losses have `per_token(logits_BCV, batch, step) -> loss_BC`; they run a chunk at a
    time on the fused head (head.py).
  whole-sequence losses have `layers`, from which the step finds the pairs of layers;
    `needs(pairs, student, teacher) -> (Needs, Needs)`, the features they compare; and
    `whole(student, teacher, adapters, batch, pairs) -> Mean`. Those with adapters have
    `init(key, pairs, student, width)` too.
"""

SHARED = ("divergences", "features", "supports")
