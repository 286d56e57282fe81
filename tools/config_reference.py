"""Writes the configuration reference, docs/configuration.md, from the source of the package.

python tools/config_reference.py > docs/configuration.md
"""

from distill_jax import config_reference as reference
from distill_jax.commands.help import first_paragraph
from distill_jax.registry import ENTRY_CLASSES

INTRODUCTION = """\
# Configuration

Every config key with its type, default and meaning. This page is generated from the declarations
of the keys: `python tools/config_reference.py > docs/configuration.md`. On the command line,
`distill-jax help KEY` prints the same text.

A config file starts from `config.base()`, which holds every key with its default:

```python
from distill_jax import config


def get_config():
  c = config.base()
  c.teacher.source = "models/teacher"
  c.losses.soft = config.loss("kd", weight=0.9)
  return c
```

`--config.train.steps=100` overrides a key on the command line.
"""


def page() -> str:
  """Returns the page in Markdown."""
  parts = [INTRODUCTION, "## The run", table(reference.fields_of(reference.CONFIG))]
  for name, ref in reference.sections().items():
    if name.partition(".")[0] in ENTRY_CLASSES or repeats(name):
      continue
    parts += [f"## `{name}`", reference.doc_of(ref), table(reference.fields_of(ref))]
  for package in ENTRY_CLASSES:
    parts.append(f"## Entries of `{package}`")
    for name in reference.entries(package):
      ref = reference.entry_class(package, name)
      parts += [f"### `{package}`: `{name}`", first_paragraph(reference.doc_of(ref.module))]
      parts.append(table(reference.fields_of(ref)))
  return "\n\n".join(part.strip() for part in parts if part) + "\n"


def repeats(name: str) -> bool:
  """Returns whether a section has the keys of another one, which the page has already."""
  return name.startswith("links.NAME.")


def table(fields: list[reference.Field]) -> str:
  """Returns the keys as a Markdown table; "" for no keys."""
  if not fields:
    return ""
  rows = [f"| `{f.name}` | {code(f.type)} | {default(f)} | {cell(f.doc)} |" for f in fields]
  return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def default(field: reference.Field) -> str:
  """Returns the default of a key; of a section, nothing."""
  return "" if field.section is not None and not field.is_dict else code(field.default)


def code(text: str) -> str:
  """Returns a piece of code for a cell of a table."""
  return f"`{cell(text)}`" if text else ""


def cell(text: str) -> str:
  """Returns a text for a cell of a table."""
  return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
  print(page(), end="")
