"""What is learnt, where it is not the next token: one task a file; the folder is the registry.

A task is a module with a frozen dataclass `Task`, an entry of `tasks` in a config:

  open(split, came) -> Source   its examples, in an order that never changes: split is "train" or
                                "heldout", came the model that reads them (hub.load.Pretrained,
                                which may bring a tokenizer) or None
  inputs(stack) -> pytree       what a model reads, of a batch: stack(name) is a field [B, ...]
  seen(stack) -> bool [B, S]    of models that say one thing of all they read: the positions that
                                are no padding, [B, 1] where none is
  check(config) -> None         refuses a family's Config that cannot read or say this
  hub(config) -> {file: JSON}   what the exported folder of a model of that Config says of it, as
                                {"config.json": {"id2label": ...}}, which goes into that file
  seed, views, augment          of tasks that augment: see tasked.Rows

  scores(said, source) -> {name: number}, and search, labelled: of tasks of texts, which `evaluate`
                                and `generate` let models say: see decode/said.py

and a Source has

  classes       how many rows of a head its labels name
  positions     labels an example, T
  digest        sha256 in hex of the data and of all that decides how it is read
  len(source), source[i]        a dict of numpy arrays, each of one shape for every i: what
                                `inputs` asks for, `labels_T` int32 and `mask_T` bool
"""

SHARED = ("dataset", "pseudo_labels")
