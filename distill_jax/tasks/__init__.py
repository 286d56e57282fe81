"""Tasks other than next-token prediction: the model's inputs and its training labels.

Each task is one file, and the folder is the registry. A task is a module with a frozen dataclass
`Task`, a subclass of `Task` below, whose fields are the keys of an entry of `tasks` in a config.
Tasks whose models generate texts, in `generate` and `evaluate`, are subclasses of `TextTask`.
"""

from distill_jax.tasks._base import Example, PseudoLabels, Stack, Task, TaskSource, TextTask

__all__ = ["Example", "PseudoLabels", "Stack", "Task", "TaskSource", "TextTask"]

SHARED = ("dataset", "model_checks", "pseudo_labels")
