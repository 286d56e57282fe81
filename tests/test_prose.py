"""The English of the package: docstrings, comments and error messages.

The rules are those of the JAX and Keras documentation. They cannot make a sentence good; they keep
out the habits that made sentences of this project hard to read.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_jax import config

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parent.parent
FILES = sorted(
  path
  for folder in ("distill_jax", "configs", "launch", "tools")
  for path in (ROOT / folder).rglob("*.py")
)

# A docstring begins with a verb phrase ("Returns ...") or a noun phrase. These begin neither.
NOT_A_BEGINNING = re.compile(
  "(after|and|as|at|because|before|but|by|for|from|how|if|in|it|its|no|nobody|none|not|of|on|or|so"
  "|such|than|that|there|they|those|though|through|to|under|unless|until|what|when|where|whether"
  "|which|while|who|whom|whose|with|without)",
  re.I,
)

# Words and phrases that the documentation of JAX would not use, each with a plain replacement.
DIALECT = {
  r"(said|says|say)": "outputs, predicts, states, is set to",
  r"(goes|go|going|gone) on": "continues, resumes",
  r"(came|comes) (from|with|before|to|out|first|after)": "is from, precedes",
  r"(is|are|be|was|were) (asked|told)": "is evaluated on, is given, must",
  r"(nobody|no one|so-manieth|whom|wherever|thereof|hence|perhaps)": "name the subject",
  r"(?<!there )(is|are|was|were|holds|gives|names) no(?! longer| more)": "is not a, has no, lacks",
  r"(there is|there are|is|are) none": "is missing, is empty",
  r"but for|but in|all but": "except",
  r"the (like|least|most) (of|that|it)": "the minimum, the maximum",
  r"at (the )?(hand|most|least) (it|that|they)": "the minimum, the maximum",
  r"so (many|much|few)": "this number of, N",
  r"(left|leave|leaves) (it )?out": "skipped, omitted",
  r"(as it is|as they are|as it was|as they were)": "unchanged, directly",
  r"is not there|are not there|is there already": "does not exist, exists",
  r"(learnt|taught|unsaid|likeliest|alike|beside)": "trained, most likely, equal, next to",
  r"of its own|of their own": "its own X, separate",
}
DIALECT_PATTERNS = [(re.compile(rf"\b({p})\b", re.I), plain) for p, plain in DIALECT.items()]


def config_keys(tree, prefix="") -> Iterator[str]:
  """Yields every dotted key of a config."""
  for key, value in tree.items():
    if prefix:  # a bare section name, such as "data", is an ordinary word
      yield f"{prefix}{key}"
    if hasattr(value, "items"):
      yield from config_keys(value, f"{prefix}{key}.")


KEYS = sorted(config_keys(config.base()), key=len, reverse=True)
A_KEY = re.compile(r"(?<![\w./-])(" + "|".join(map(re.escape, KEYS)) + r")(?![\w/])")
OF_A_KEY = re.compile(r"^\S+( \S+)? is .+; expected .+\. .+[.?}]$", re.S)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of every docstring, those of attributes included."""
  for node in ast.walk(tree):
    if not isinstance(body := getattr(node, "body", None), list):
      continue
    for statement in body:
      value = statement.value if isinstance(statement, ast.Expr) else None
      if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield statement.lineno, value.value


def template(node: ast.expr) -> str | None:
  """Returns the text of a string expression with {} for its values, or None for another one."""
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  if isinstance(node, ast.JoinedStr):
    return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
  return None


def messages(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
  """Yields (line, text, is_whole) of every message of an InputError or ValueError.

  The arguments of `bad_value` and `check_choice` are parts of a message (is_whole is False): they
  add the key.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
      if node.func.id in ("InputError", "ValueError") and (text := template(node.args[0])):
        yield node.lineno, text, True
      if node.func.id in ("bad_value", "check_choice"):
        for argument in node.args[2:]:
          if text := template(argument):
            yield node.lineno, text + ".", False


def comments(source: str) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of every comment."""
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# noqa", "# type:")):
      yield token.start[0], token.string


def faults(path: Path) -> list[str]:
  """Returns what is wrong with the prose of a file, one sentence a fault."""
  source = path.read_text(encoding="utf-8")
  tree = ast.parse(source)
  found = []
  prose = list(comments(source))
  for line, text in docstrings(tree):
    prose.append((line, text))
    first = text.strip().split("\n\n")[0].strip()
    word = re.split(r"[\s,:.]", first)[0]
    if NOT_A_BEGINNING.fullmatch(word):
      found.append(f"{line}: the docstring begins with {word!r}; begin with a verb or a noun")
    if not first.endswith((".", ":", "?", "`")):
      found.append(f"{line}: the first sentence of the docstring has no full stop")
    if re.search(r"^\s*(Args|Attributes|Raises|Returns|Yields): +\S", text, re.M):
      found.append(f"{line}: write Args and Returns as a block, one entry a line")
    if re.match(r"(Args|Attributes|Raises|Returns):", first):
      found.append(f"{line}: begin the docstring with a sentence, not with a block")
  for line, text, is_whole in messages(tree):
    prose.append((line, text))
    if not text.rstrip().endswith((".", "?", "}")):
      found.append(f"{line}: the message is not a sentence with a full stop: {text!r}")
    clause = re.split(r"; |\. ", text)[0]
    if is_whole and A_KEY.search(clause) and not OF_A_KEY.match(text):
      found.append(
        f"{line}: use errors.bad_value, or `KEY is VALUE; expected …. ACTION.`: {text!r}"
      )
  for line, text in prose:
    for pattern, plain in DIALECT_PATTERNS:
      if match := pattern.search(re.sub(r"`[^`]*`|\"[^\"\n]*\"|'[^'\n]*'|\bNone\b", "", text)):
        found.append(f"{line}: {match[0]!r}; write instead: {plain}")
  return sorted(found, key=lambda fault: int(fault.split(":")[0]))


def folder(path: Path) -> str:
  """Returns the first two parts of a file's path, such as "distill_jax/nn"."""
  return "/".join(path.relative_to(ROOT).parts[:2])


@pytest.mark.parametrize("name", sorted({folder(path) for path in FILES}))
def test_reads_as_plain_english(name):
  checked = [path for path in FILES if folder(path) == name]
  found = [f"{path.relative_to(ROOT)}:{fault}" for path in checked for fault in faults(path)]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  "source",
  [
    '"""Of the classes."""',
    '"""Returns what the teacher said."""',
    'def f():\n  """Args: x, a number."""',
    'raise InputError("train.steps is 0; it is at least 1")',
    'raise InputError("no such file")',
  ],
)
def test_a_habit_is_found(source, tmp_path):
  (tmp_path / "module.py").write_text(source)
  assert faults(tmp_path / "module.py")


PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize(
  "path", [p for p in PAGES if p.name != "configuration.md"], ids=lambda p: p.name
)
def test_a_page_reads_as_plain_english(path):
  text = re.sub(r"^\s*```.*?^\s*```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
  text = re.sub(r"`[^`]*`|\"[^\"\n]*\"", "", text)
  found = [match[0] for pattern, _ in DIALECT_PATTERNS for match in pattern.finditer(text)]
  assert not found, f"{path.name}: {found}"


if __name__ == "__main__":  # python tests/test_prose.py [PREFIX ...]: prints every fault
  import sys

  for path in FILES:
    if not sys.argv[1:] or str(path.relative_to(ROOT)).startswith(tuple(sys.argv[1:])):
      for fault in faults(path):
        print(f"{path.relative_to(ROOT)}:{fault}")
