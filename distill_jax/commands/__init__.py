"""The commands of `distill-jax`, one module per verb.

A command is a module with `run(config, workdir) -> dict`, whose result can be written as JSON. It
can also have `text(result) -> str`, which formats the result for a person. `distill-jax help VERB`
prints the docstring of the module.
"""
