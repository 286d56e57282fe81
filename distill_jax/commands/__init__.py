"""One verb a file; the folder is the registry that cli.py reads.

A command is a module with `run(config, workdir) -> dict`, whose result is JSON, and perhaps
`text(result) -> str`, which puts the result in words for a person.
"""
