"""One loss a file; the folder is the registry.

A loss is a module with a frozen dataclass `Loss` whose fields are its config keys, `weight`
(a Schedule) among them. There are two kinds:

  token losses have `per_token(logits_BCV, batch, step) -> loss_BC`; they run a chunk at a
    time on the fused head (head.py).
  whole-sequence losses have `needs(student, teacher) -> (Needs, Needs)`, the features they
    compare; `init(key, student, teacher)`, their adapters ({} without); and
    `whole(student, teacher, adapters, batch) -> Mean`.
"""
