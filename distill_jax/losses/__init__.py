"""One loss a file; the folder is the registry.

A loss is a module with a frozen dataclass `Loss` whose fields are its config keys, `weight`
(a Schedule) among them. A token loss has `per_token(logits_BCV, batch, step) -> loss_BC`
and is run a chunk at a time on the fused head (head.py).
"""
