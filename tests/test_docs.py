"""The documentation: its examples run, its links and commands name what exists."""

import ast
import contextlib
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_store
from doc_commands import code, commands
from experiments import load_config
from json_lines import write_lines

from distill_jax import config, flags, registry
from distill_jax.commands import evaluate, record
from distill_jax.commands import filter as filter_command
from distill_jax.errors import InputError
from distill_jax.hub import formats
from distill_jax.hub.export import export_model
from distill_jax.losses import KD, SampledTargets, divergences
from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop
from distill_jax.types import Batch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / n for n in ("README.md", "CONTRIBUTING.md"))]


def blocks(page, language):
  """Returns the code blocks of a page in one language."""
  text = (DOCS / page).read_text(encoding="utf-8")
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# Links, commands, keys and files.


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.name)
def page(request):
  """(path, text) of a page."""
  return request.param, request.param.read_text(encoding="utf-8")


def without_code(text):
  return re.sub(r"^\s*```.*?^\s*```$|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text):
  """Returns the anchors of the headings of a page, as MkDocs makes them."""
  headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
  words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
  return {re.sub(r"[-\s]+", "-", heading) for heading in words}


def test_links_lead_to_pages_and_headings(page):
  path, text = page
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
    if re.match(r"[a-z]+://", target):
      continue
    name, _, anchor = target.partition("#")
    linked = path.parent / name if name else path
    assert linked.exists(), f"{path.name} links to {target}"
    if anchor:
      found = anchors(linked.read_text(encoding="utf-8"))
      assert anchor in found, f"{path.name} links to {target}; the headings are {found}"


VERBS = registry.names("commands")
FLAGS = {name for name in vars(flags) if name.isupper()} | {"TEACHER", "STUDENT", "DATA"}
LAUNCHER_FLAGS = {"--dry_run", "--spot", "--keep"}


def keys(tree, prefix=""):
  for key, value in tree.items():
    yield f"{prefix}{key}"
    if hasattr(value, "items"):
      yield from keys(value, f"{prefix}{key}.")


KEYS = set(keys(config.base()))
# Dicts whose keys a config chooses.
NAMED = (*registry.ENTRY_CLASSES, "augmentations", "links", "teachers", "train.teachers")
NAMED = (*NAMED, "evaluate.models", "student.changes", "teacher.changes", "student.rules")


def is_key(dotted):
  return dotted in KEYS or dotted.startswith(tuple(f"{name}." for name in NAMED))


def test_commands_name_verbs_flags_and_keys(page):
  path, text = page
  for verb, arguments in commands(text):
    where = f"{path.name}: distill-jax {verb} {' '.join(arguments)}"
    if verb.startswith("--"):
      assert verb in ("--help", "--version"), where
      continue
    assert verb in VERBS, where
    for argument in arguments:
      flag, _, value = argument.partition("=")
      if flag.startswith("--config."):
        assert is_key(flag.removeprefix("--config.")), where
      elif flag.startswith("--"):
        assert flag[2:].upper() in FLAGS or flag in LAUNCHER_FLAGS, where
      if flag == "--config" and value.startswith("configs/"):
        assert (ROOT / value.partition(":")[0]).is_file(), where


def test_the_format_of_every_export_exists(page):
  """The config and the keys of a command agree on the numbers of the exported weights."""
  path, text = page
  for verb, arguments in commands(text):
    file, *others = [a for a in arguments if a.startswith("--config")] or [""]
    if verb == "export" and file.startswith("--config=configs/"):
      name, _, choice = file.removeprefix("--config=").partition(":")
      c = load_config(ROOT / name).get_config(*filter(None, [choice]))
      for key, value in (other.removeprefix("--config.").split("=") for other in others):
        with contextlib.suppress(ValueError, SyntaxError):
          value = ast.literal_eval(value)
        c.update_from_flattened_dict({key: value})
      resolved = config.resolve(c)
      assert formats.choose(resolved.export, resolved.student.quantise), (path.name, others)


def test_keys_exist(page):
  path, text = page
  sections = "|".join(key for key in KEYS if "." not in key)
  for line in code(text):
    found = re.findall(rf"(?:^|[\s(])(?:c\.)?((?:{sections})(?:\.[a-z_0-9]+)+)(?![\w(/])", line)
    for dotted in found:
      if dotted.endswith((".py", ".md", ".json", ".yml", ".jsonl", ".txt", ".npz")):
        continue
      if re.match(r"(config|registry|inspect)\.", dotted) or f"{dotted}(" in line:
        continue
      assert is_key(dotted), f"{path.name}: {dotted} in {line!r}"


def test_files_exist(page):
  path, text = page
  for line in code(text):
    for name in re.findall(r"(?<![\w/.])(?:configs|tools|launch|tests|distill_jax)/[\w/.*]+", line):
      name = name.rstrip(".")
      if "NAME" in name or "FILE" in name:
        continue
      exists = any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists()
      assert exists, f"{path.name}: {name}"


def test_make_targets_exist(page):
  path, text = page
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
  for line in code(text):
    if match := re.match(r"make ([a-z -]+?)(?: +#.*)?$", line.strip()):
      assert set(match[1].split()) <= targets, f"{path.name}: {line}"


def test_every_page_is_in_the_navigation():
  nav = (ROOT / "mkdocs.yml").read_text()
  named = set(re.findall(r"[\w-]+\.md", nav.partition("\nnav:")[2]))
  assert named == {path.name for path in DOCS.glob("*.md")}


def test_no_page_needs_the_network(page):
  assert not re.search(r"!\[[^\]]*\]\(https?://|<(?:script|link|img)\b", page[1])


# Losses.

KINDS = {  # (kind, has_logp, temperature, missing_mass) by the table's column
  "`sampled`": ("sampled", False, 1.0, "none"),
  "`sampled` with `logp`": ("sampled", True, 1.0, "none"),
  "`topk`, `tail_bucket`": ("topk", False, 1.0, "tail_bucket"),
  "`topk`, `renormalise`": ("topk", False, 1.0, "renormalise"),
  "`dense`": ("dense", False, 1.0, "renormalise"),
}


def accepted(divergence, records):
  """Returns the temperatures of `kd` that are accepted: "any", "recorded" or "no"."""
  for temperature, cell in ((2.0, "any"), (1.0, "recorded")):
    with contextlib.suppress(InputError):
      KD(divergence=divergence, temperature=temperature).check_records(*records)
      return cell
  return "no"


def test_the_table_of_divergences_is_what_the_losses_accept():
  rows = [["divergence", *KINDS], ["---"] * (1 + len(KINDS))]
  for name in divergences.ALL:
    rows.append([f"`{name}`", *(accepted(name, records) for records in KINDS.values())])
  table = "".join(f"| {' | '.join(row)} |\n" for row in rows).replace(" --- ", "---")
  assert f"\n{table}\n" in (DOCS / "losses.md").read_text(encoding="utf-8"), table


# Record format.


def example_manifest():
  identity = json.loads(blocks("record-format.md", "json")[0])
  return Manifest(**identity, extents=(1,))


def example_features():
  text = (DOCS / "record-format.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| `(\w+)` \| `([0-9a-f ]+)` \|$", text, re.M)
  return {name: bytes.fromhex(value) for name, value in rows}


def test_the_worked_example_has_the_bytes_that_the_codec_writes():
  sequence = {
    "tokens_T": np.array([5, 9, 2]),
    "segments_T": np.array([1, 1, 1]),
    "mask_T": np.array([True, True, False]),
    "ids_TN": np.array([[2, 9, 9, 12], [2, 2, 2, 3], [0, 0, 0, 0]]),
    "argmax_T": np.array([9, 2, 0]),
    "label_logp_T": np.array([-0.75, -0.25, 0]),
    "entropy_T": np.array([1.25, 0.5, 0]),
  }
  m, features = example_manifest(), example_features()
  assert set(features) == set(tf_example.names(m))
  assert tf_example.encode(0, sequence, m) == features
  identity = blocks("record-format.md", "json")[0].strip()
  assert hashlib.sha256(identity.encode()).digest()[:8] == features["key"][:8]


def read_sampled():
  scope = {}
  exec(blocks("record-format.md", "python")[0], scope)
  return scope["read_sampled"]


def test_the_reader_of_the_page_reads_the_worked_example():
  tokens, mask, entries = read_sampled()(example_features(), n=4, vocab_size=16)
  assert tokens == [5, 9, 2]
  assert mask == [1, 1, 0]
  assert entries == [{2: 1, 9: 2, 12: 1}, {2: 3, 3: 1}]


def test_the_reader_of_the_page_reads_what_the_library_writes():
  m = tiny_store.manifest()
  for i in range(3):
    sequence = tiny_store.sequence(i)
    features = tf_example.encode(i, sequence, m)
    tokens, mask, entries = read_sampled()(features, m.n, m.vocab_size)
    assert tokens == sequence["tokens_T"].tolist()
    assert mask == sequence["mask_T"].tolist()
    for ids, counted in zip(sequence["ids_TN"][sequence["mask_T"]], entries, strict=True):
      assert dict(
        zip(*map(np.ndarray.tolist, np.unique(ids, return_counts=True)), strict=True)
      ) == (counted)


def test_every_feature_is_described():
  text = (DOCS / "record-format.md").read_text(encoding="utf-8")
  for name in tf_example.FIELDS:
    assert f"`{name}`" in text, name
  for name in Manifest.__dataclass_fields__:
    assert f"`{name}`" in text, name


# Extensions: the files of the pages "A new loss", "A new filter", "A new task", "A new family".


def extension(page, package, folder, monkeypatch):
  """Writes the file of a page, adds its folder to the registry, and returns the module."""
  text = (DOCS / page).read_text(encoding="utf-8")
  path, source = re.search(r'^```python title="(.*?)"\n(.*?)^```$', text, re.M | re.S).groups()
  file = folder / path
  file.parent.mkdir()
  file.write_text(source, encoding="utf-8")
  searched = importlib.import_module(f"distill_jax.{package}").__path__
  monkeypatch.setattr(importlib.import_module(f"distill_jax.{package}"), "__path__", [*searched])
  registry.add_folder(package, file.parent)
  yield registry.load(package, file.stem)
  sys.modules.pop(f"distill_jax.{package}.{file.stem}")


@pytest.fixture
def load(tmp_path, monkeypatch):
  loaded = []

  def load(page, package):
    loaded.append(extension(page, package, tmp_path, monkeypatch))
    return next(loaded[-1])

  yield load
  for generator in loaded:
    next(generator, None)


def get_config(page):
  """Runs the config of a page, without its add_folder, whose folder the test has added."""
  source = blocks(page, "python")[0]  # the first without a title
  scope = {}
  exec(re.sub(r"^registry.add_folder.*$", "", source, flags=re.M), scope)
  return scope["get_config"]()


def test_a_new_loss_trains(load, tmp_path):
  load("new-loss.md", "losses")
  c = tiny.tiny(tmp_path)
  c.teacher.source = ""
  c.losses = get_config("new-loss.md").losses
  c.train.steps = 2
  resolved = config.resolve(c)
  record.run(resolved, tmp_path / "records")
  with Workdir(tmp_path / "run", resolved) as workdir:
    row = loop.train(resolved, workdir)
  assert np.isfinite(row["loss"])
  assert row["loss"] > 0


def test_a_new_loss_is_what_the_page_states(load):
  loss = load("new-loss.md", "losses").Loss()
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
  logits[..., 4] = -np.inf
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  entropy = -np.sum(p[..., :4] * np.log(p[..., :4]), -1)
  zeros = np.zeros((2, 3), np.int32)
  targets = SampledTargets(
    ids_BTK=zeros[..., None], weight_BTK=zeros[..., None], entropy_BT=zeros + 0.5
  )
  batch = Batch(None, zeros, zeros == 0, {"teacher": targets})
  found = loss.token_loss(jnp.asarray(logits), batch, 0)
  np.testing.assert_allclose(found, (entropy - 0.5) ** 2, rtol=1e-5)
  gradient = jax.grad(lambda z: jnp.sum(loss.token_loss(z, batch, 0)))(jnp.asarray(logits))
  assert np.all(np.isfinite(gradient))
  with pytest.raises(InputError, match="The loss 'entropy_match' needs entropies"):
    without = batch.replace(targets={"teacher": targets.replace(entropy_BT=None)})
    loss.token_loss(jnp.asarray(logits), without, 0)
  loss.check_records("sampled", False, 1.0, "none")
  with pytest.raises(InputError, match="records.temperature is 2.0; expected 1, the temperature"):
    loss.check_records("sampled", False, 2.0, "none")


def test_a_new_filter_filters(load, tmp_path):
  load("new-filter.md", "filters")
  rows = [
    {"id": i, "sample": 0, "prompt": "p", "text": text, "reason": "eos", "about": {}}
    for i, text in enumerate(("plain", "see https://example.com"))
  ]
  write_lines(tmp_path / "samples.jsonl", rows)
  c = get_config("new-filter.md")
  c.filter.samples = str(tmp_path)
  result = filter_command.run(config.resolve(c), tmp_path)
  assert result["kept"] == 1
  assert result["rejected_by"] == {"no_links": {"has links": 1}}


def test_a_new_task_is_recorded_trained_and_evaluated(load, tmp_path):
  load("new-task.md", "tasks")
  rng = np.random.default_rng(0)
  c = get_config("new-task.md")
  shape = registry.load("models", "vit").CONFIGS["tiny"]
  size, channels = shape.image_size, shape.num_channels
  for name in ("train", "heldout"):
    images = rng.integers(0, 256, (24, size, size, channels)).astype(np.uint8)
    np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(24) % 3)
  c.tasks.main.path = str(tmp_path / "train.npz")
  c.tasks.main.heldout = str(tmp_path / "heldout.npz")
  for key in ("family", "shape", "changes"):
    c.teacher[key] = c.student[key]
  c.losses.soft = config.loss("kd")
  c.records.kind, c.train.records = "dense", (str(tmp_path / "records"),)
  c.train.steps, c.train.batch_size, c.evaluate.batch_size = 2, 4, 4
  c.evaluate.models = {"trained": f"run:{tmp_path / 'run'}"}
  resolved = config.resolve(c)
  with Workdir(tmp_path / "records", resolved) as records:
    record.run(resolved, records)
  with Workdir(tmp_path / "run", resolved) as workdir:
    row = loop.train(resolved, workdir)
  assert np.isfinite(row["loss"])
  rows = evaluate.run(resolved, tmp_path)["models"]
  assert 0 <= rows["trained"]["accuracy"] <= 1


def test_a_new_family_agrees_with_transformers(load, tmp_path):
  parity = pytest.importorskip("parity")
  load("new-family.md", "models")
  theirs = parity.torch_model("seed_oss", attention_bias=True, attention_out_bias=False)
  ours = parity.ours_from(theirs, tmp_path / "theirs")
  assert max(parity.forward_errors(theirs, ours, parity.tokens())) < parity.FORWARD
  export_model(ours, tmp_path / "ours", tokenizer=None, generation={}, card="", dtype="float32")
  again = parity.transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  tokens = parity.torch.from_numpy(parity.tokens()).long()
  with parity.torch.no_grad():
    assert parity.torch.equal(again(tokens).logits, theirs(tokens).logits)
