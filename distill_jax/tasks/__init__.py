"""Tasks other than the next token: what a model reads and which labels it is trained on.

One task a file; the folder is the registry. A task is a module with a frozen dataclass `Task`, a
subclass of `Task` below, whose fields are the keys of an entry of `tasks` in a config. Tasks that
`generate` and `evaluate` let models write texts for are subclasses of `TextTask`.
"""

from distill_jax.tasks._base import Example, PseudoLabels, Stack, Task, TaskSource, TextTask

__all__ = ["Example", "PseudoLabels", "Stack", "Task", "TaskSource", "TextTask"]

SHARED = ("dataset", "pseudo_labels")
