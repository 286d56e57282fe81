"""One augmentation a file; the folder is the registry.

An augmentation is a module with a frozen dataclass `Augmentation`, an entry of `augmentations`
in a config, whose call is pure: (rng, example, other) -> example. `rng` is a
numpy.random.Generator, all of its randomness; `example` a source's fields; `other()` draws one
more example of the source. A task's `augment` names those it wants, in their order.
"""
