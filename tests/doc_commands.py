"""The code and the command lines on a page of the documentation."""

import re


def code(text):
  """Yields the lines of code of a page: those of blocks, continued ones joined, and inline code."""
  for block in re.findall(r"^\s*```\w*[^\n]*\n(.*?)^\s*```$", text, re.M | re.S):
    yield from re.sub(r"\\\n\s*", " ", block).splitlines()
  inline = re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.M | re.S)
  yield from re.findall(r"`([^`\n]+)`", inline)


def commands(text):
  """Yields (verb, arguments) of every command line on a page."""
  for line in code(text):
    line = line.split(" #")[0]
    for start in (r"\bdistill-jax ", r"^launch/\S+ .* -- ", r" -- ", r"slurm\.sbatch "):
      if match := re.search(start + r"(.*)$", line):
        words = match[1].split()
        if words and not words[0].isupper():
          yield words[0], words[1:]
        break
