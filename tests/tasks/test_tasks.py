"""Tests of text tasks from record to export."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from tiny_store import contents

from distill_jax import config
from distill_jax.commands import evaluate, export, record
from distill_jax.errors import InputError
from distill_jax.evals import similarity
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import loading, runs
from distill_jax.nn import params
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import open_store
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import dataset, model_checks
from distill_jax.training import loop, state, validate
from distill_jax.training import stores as training_stores
from distill_jax.training.step import Fixed
from distill_jax.types import Batch

CLASSES = ("odd", "even")


def write_numbers(path, n=40):
  """Writes texts that name a number, with a label for its parity."""
  lines = [{"text": f"the number {i} is here", "label": CLASSES[1 - i % 2]} for i in range(n)]
  path.write_text("\n".join(map(json.dumps, lines)))
  return path


def configured(folder):
  c = config.base()
  for model, layers in ((c.teacher, 2), (c.student, 1)):
    model.family, model.shape = "bert", "tiny"
    model.changes = {"num_hidden_layers": layers}
  c.tasks.parity = config.task(
    "text_classes",
    path=str(write_numbers(folder / "numbers.jsonl")),
    classes=CLASSES,
    max_tokens=32,
    heldout_fraction=0.3,
    tokenizer=str(tiny.write_tokenizer(folder / "tokenizer.json")),
  )
  c.records.kind, c.records.batch_size = "dense", 4
  c.losses.soft = config.loss("kd", weight=0.7, temperature=2.0)
  c.losses.hard = config.loss("ce", weight=0.3)
  c.train.records = (str(folder / "records"),)
  c.train.steps, c.train.batch_size, c.train.checkpoint_every = 2, 4, 2
  c.evaluate.batch_size = 4
  return c


@pytest.fixture
def c(tmp_path):
  return configured(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns (folder, config, metrics of the last step) of a run from records."""
  folder = tmp_path_factory.mktemp("run")
  c = configured(folder)
  c.records.heldout_sequences = 5
  resolved = config.resolve(c)
  with Workdir(folder / "records", resolved) as records:
    record.run(resolved, records)
  with Workdir(folder / "student", resolved) as student:
    return folder, configured(folder), loop.train(resolved, student)


def test_a_student_is_trained_to_classify_texts(run, tmp_path):
  """The exported model has the same outputs in transformers as in `evaluate`."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  folder, c, last = run
  assert last["tokens"] == 4 and 0 < last["kl/teacher"] < 1
  c.evaluate.models = {"student": f"run:{folder / 'student'}"}
  c.export.dir, c.export.dtype = str(tmp_path / "hub"), "float32"
  resolved = config.resolve(c)
  row = evaluate.run(resolved, tmp_path)["models"]["student"]
  assert 0 <= row["accuracy"] <= 1
  export.run(resolved, folder / "student")
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub")
  assert theirs.config.id2label == dict(enumerate(CLASSES))

  rows = dataset.open_examples(resolved, "parity", "heldout", None)
  ids, seen = (np.stack([r[k] for r in rows]) for k in ("tokens_S", "valid_S"))
  labels = np.array([r["labels_T"][0] for r in rows])
  with torch.no_grad():
    z = theirs(torch.tensor(ids).long(), attention_mask=torch.tensor(seen)).logits
  ce = torch.nn.functional.cross_entropy(z, torch.tensor(labels).long())
  assert row["ce"] == pytest.approx(float(ce), abs=2e-6)  # float32, three layers
  assert row["accuracy"] == pytest.approx((z.argmax(-1).numpy() == labels).mean())


def test_dense_records_give_the_gradient_of_an_online_teacher(run):
  """Records differ by float16 rounding: 2^-11 of a log-probability below 1."""
  _, c, _ = run
  online = config.resolve(c)
  online = dataclasses.replace(
    online, train=dataclasses.replace(online.train, online=True, records=())
  )
  grads = []
  for resolved in (config.resolve(c), online):
    stores = training_stores.open_stores(resolved)
    step = loop.make_step(resolved, stores)
    batch = next(training_stores.batches(resolved, stores))
    keys = runs.keys(0)
    mesh = loop.sharding.make_mesh(devices=jax.devices()[:1])
    student, models = loading.open_source(resolved.student).load(mesh, keys["student"]).model, {}
    if resolved.train.online:
      models = {"teacher": loading.open_source(resolved.teacher).load(mesh, keys["teacher"]).model}
    batch = jax.tree.map(jax.numpy.asarray, batch)
    both = {"soft": 1.0, "hard": 1.0}
    fixed = Fixed(models, 0, 4.0)
    loss = lambda s, f=fixed, st=step, b=batch, w=both: st.loss((s, {}), b, f, w)[0]
    grads.append(jax.tree.leaves(jax.jit(jax.grad(loss))(student)))
  for a, b in zip(*grads, strict=True):
    assert np.abs(a - b).max() <= 1e-3 * max(np.abs(b).max(), 1e-3)


def test_pseudo_label_loss_works_with_any_records(run):
  _, c, _ = run
  c = c.copy_and_resolve_references()
  c.losses = {"pseudo": config.loss("pseudo_label")}
  resolved = config.resolve(c)
  stores = training_stores.open_stores(resolved)
  validate.check_run(resolved, stores)
  batch = next(training_stores.batches(resolved, stores))
  targets = batch.targets["teacher"]
  best = np.take_along_axis(targets.ids_BTK, targets.logp_BTK.argmax(-1)[..., None], -1)[..., 0]
  z_BCV = jax.random.normal(jax.random.key(0), (4, 1, 2))
  want = -np.take_along_axis(np.asarray(jax.nn.log_softmax(z_BCV)), best[..., None], -1)[..., 0]
  batch = jax.tree.map(jax.numpy.asarray, batch)
  got = resolved.losses["pseudo"].token_loss(z_BCV, batch, 0)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_records_are_of_one_task_and_data(run):
  folder, c, _ = run
  c = c.copy_and_resolve_references()
  moved = folder / "moved.jsonl"
  moved.write_bytes((folder / "numbers.jsonl").read_bytes())
  c.tasks.parity.path, c.tasks.parity.on_bad = str(moved), "skip"
  assert len(training_stores.open_stores(config.resolve(c))[0]) == len(
    open_store(folder / "records")
  )
  c.tasks.parity.max_tokens = 31
  with pytest.raises(InputError, match="recorded with another task, data or augmentation"):
    training_stores.open_stores(config.resolve(c))


def test_held_out_examples_are_recorded_by_the_same_command(run, tmp_path):
  folder, c, _ = run
  heldout = MultiTeacherStore(open_store(folder / "records" / "heldout"), {})
  examples = dataset.open_examples(config.resolve(c), "parity", "heldout", None, 5)
  rows = dataset.RecordedTask(examples, heldout)  # compares labels and digests
  assert len(rows) == 5 and rows[4]["logp_TK"].shape == (1, 2)
  train = dataset.open_examples(config.resolve(c), "parity", "train", None)
  seen = {row["tokens_S"].tobytes() for row in train}
  assert not seen & {row["tokens_S"].tobytes() for row in examples}
  c = c.copy_and_resolve_references()
  c.data.split, c.data.sequences = "heldout", 5
  record.run(config.resolve(c), tmp_path / "alone")
  assert contents(tmp_path / "alone") == contents(folder / "records" / "heldout")
  c.data.split, c.data.sequences = "train", 0
  c.tasks.parity.heldout_fraction, c.records.heldout_sequences = 0.0, 5
  with pytest.raises(InputError, match="held-out rows are the rows to train on"):
    record.run(config.resolve(c), tmp_path / "refused")


def with_a_second(c):
  c.tasks.again = config.task(
    "text_classes",
    path=c.tasks.parity.path,
    classes=("even", "odd"),
    max_tokens=32,
    tokenizer=c.tasks.parity.tokenizer,
  )
  c.student.changes = {"num_labels": 4, "num_hidden_layers": 1}


@pytest.mark.slow
def test_several_tasks_are_recorded_one_by_one_and_trained_together(c, tmp_path):
  """The teacher of each task is a part of one head."""
  with_a_second(c)
  c.teacher.changes = {"num_labels": 4, "num_hidden_layers": 2}
  stores = {name: tmp_path / "of" / name for name in c.tasks}
  mesh = loop.sharding.make_mesh(devices=jax.devices()[:1])
  for i, (name, store) in enumerate(stores.items()):
    c.records.task = name
    resolved = config.resolve(c)
    with Workdir(store, resolved) as at:
      record.run(resolved, at)
    rows = open_store(store)
    teacher = loading.open_source(resolved.teacher).load(mesh, runs.keys(0)["teacher"])
    inputs = dataset.open_examples(resolved, name, "train", None)
    read = lambda field, rows=inputs: np.stack([rows[i][field] for i in range(3)])
    run = jax.jit(lambda model, inputs, compute=teacher.compute: model(inputs, compute))
    out = run(teacher.model, resolved.tasks[name].inputs(read))
    logits = np.float64(out.hidden_BTD[:, 0] @ out.head_VD.T)[:, 2 * i : 2 * i + 2]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n in range(3):
      # Records hold float16.
      np.testing.assert_allclose(rows[n]["logp_TK"][0], want[n][rows[n]["ids_TK"][0]], atol=5e-4)
  c.train.records, c.train.mixture = tuple(map(str, stores.values())), (0.5, 0.5)
  c.losses = {"soft": config.loss("kd")}
  resolved = config.resolve(c)
  both = training_stores.open_stores(resolved)
  assert [sorted(store[0]["ids_TK"][0]) for store in both] == [[0, 1], [2, 3]]
  with Workdir(tmp_path / "run", resolved) as at:
    last = loop.train(resolved, at)
  assert 0 < last["soft"] < 0.7  # probabilities near a half for the two classes of a task
  assert {"ce/parity", "ce/again", "accuracy/again", "kl/teacher"} <= set(last)
  c.evaluate.models = {"student": f"run:{tmp_path / 'run'}"}
  found = evaluate.run(config.resolve(c), tmp_path / "found")["tasks"]
  assert set(found) == {"parity", "again"}
  assert found["again"]["models"]["student"]["kl"] < 0.1 < found["again"]["models"]["teacher"]["ce"]
  c.teacher.changes = {"num_hidden_layers": 2}
  with pytest.raises(InputError, match="have 4 classes, but the model's head has 2 rows"):
    record.run(config.resolve(c), tmp_path / "refused")


def test_several_tasks_share_a_body_and_have_a_head_each(c, tmp_path):
  """The classes of the other task have probability 0 and gradient 0 in each row."""
  with_a_second(c)
  c.losses = {"hard": config.loss("ce")}
  c.train.records = ()
  resolved = config.resolve(c)
  stores = training_stores.open_stores(resolved)
  batch: Batch = next(training_stores.batches(resolved, stores))
  first = batch.labels_BT[:, 0] < 2
  assert 0 < first.sum() < 4
  np.testing.assert_array_equal(batch.class_range_BT2[first, 0], [[0, 2]] * first.sum())
  np.testing.assert_array_equal(batch.class_range_BT2[~first, 0], [[2, 4]] * (~first).sum())
  with Workdir(tmp_path / "run", resolved) as folder:
    last = loop.train(resolved, folder)
  assert 0.3 < last["ce"] < 1.2  # log 2 before training: not log 4
  labels = next(training_stores.batches(resolved, stores, 1)).labels_BT
  share = (labels < 2).mean()
  both = share * last["ce/parity"] + (1 - share) * last["ce/again"]
  assert last["ce"] == pytest.approx(both, abs=1e-6)  # float32 sums


def test_a_head_is_trained_without_its_body(c, tmp_path):
  c.student.changes = {"num_hidden_layers": 1}
  c.student.train, c.student.frozen = "frozen", ("bert.",)
  c.train.records = ()
  c.losses = {"hard": config.loss("ce")}
  resolved = config.resolve(c)
  with Workdir(tmp_path / "run", resolved) as folder:
    loop.train(resolved, folder)
  mesh = loop.sharding.make_mesh(devices=jax.devices()[:1])
  was = loading.open_source(resolved.student).load(mesh, runs.keys(0)["student"]).model
  now = loading.open_run(tmp_path / "run").restore(mesh)
  named = zip(params.named_params(was), params.named_params(now), strict=True)
  changed = {p for (p, a), (_, b) in named if not np.array_equal(a[...], b[...])}
  assert changed == {"head", "head_bias"}
  step = loop.make_step(resolved, training_stores.open_stores(resolved))
  student = loading.open_source(resolved.student)
  abstract = state.abstract_state(step, training_stores.open_stores(resolved), student)
  assert params.count(abstract.opt) < 3 * (2 * 32 + 2)  # two moments of the head, and a count
  for frozen, why in (
    (("brat.",), "student.frozen is 'brat.'; expected prefixes of the student's parameters"),
    (("bert.", "cl"), "prefixes that do not match all of the parameters"),
  ):
    c.student.frozen = frozen
    with pytest.raises(InputError, match=why):
      loop.train(config.resolve(c), tmp_path / "other")


@pytest.mark.parametrize(
  "line, why",
  [
    ({"text": " ", "label": "odd"}, "line 41 has no text"),
    ({"text": "two", "label": "prime"}, "line 41 has 'prime' in its field 'label'"),
    ({"label": "odd"}, "line 41 has no text in its field 'text'"),
  ],
)
def test_a_bad_line_stops_the_run_or_is_counted(c, tmp_path, capsys, line, why):
  with (tmp_path / "numbers.jsonl").open("a") as f:
    f.write("\n" + json.dumps(line))
  with pytest.raises(InputError, match=why):
    dataset.open_examples(config.resolve(c), "parity", "train", None)
  c.tasks.parity.on_bad = "skip"
  rows = dataset.open_examples(config.resolve(c), "parity", "train", None)
  assert f"1 of {len(rows) + 1} examples skipped" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(c):
  c.train.records = ()

  def refused(match, **changes):
    for key, value in changes.items():
      setattr(c.tasks.parity, key, value)
    with pytest.raises(InputError, match=match):
      training_stores.open_stores(config.resolve(c))

  refused("no text of class 'third'", classes=(*CLASSES, "third"))
  c.tasks.parity.classes = CLASSES
  refused("max_tokens is 200; expected from 3 to 128", max_tokens=200)
  c.tasks.parity.max_tokens = 32
  c.student.changes = {"num_labels": 1}
  refused("have 2 classes, but the model's head has 1 rows")
  c.student.changes = {"num_lables": 2}
  refused("Did you mean 'num_labels'")


def test_an_online_teacher_that_cannot_read_the_texts_is_refused(c, tmp_path):
  """Ids and positions beyond its tables would be clamped."""
  c.train.records, c.train.online = (), True

  def refused(match, **changes):
    c.teacher.changes = {"num_hidden_layers": 2, **changes}
    resolved = config.resolve(c)
    with pytest.raises(InputError, match=match), Workdir(tmp_path / "out", resolved) as folder:
      loop.train(resolved, folder)

  refused(r"have the token \d+, but the model has 40 tokens", vocab_size=40)
  refused("have 2 classes, but the model's head has 1 rows", num_labels=1)
  refused("max_tokens is 32; expected from 3 to 8", max_position_embeddings=8)


def test_an_online_teacher_with_another_tokenizer_is_refused(c, tmp_path):
  c.tasks.parity.tokenizer = ""
  other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  ours, other = other.to_str(), (other.add_special_tokens(["[X]"]), other.to_str())[1]

  def model(name, text):
    files = TokenizerFiles(text, None, {})
    opened = types.SimpleNamespace(tokenizer=files, source=name)
    return types.SimpleNamespace(tokenizer=files, pretrained=opened)

  tasks, student = config.resolve(c).tasks, model("student", ours)
  model_checks.check_tokenizer(tasks, student, "teacher", model("same", ours))
  with pytest.raises(InputError, match="but the online teacher 'teacher' has the tokenizer of"):
    model_checks.check_tokenizer(tasks, student, "teacher", model("other", other))


@pytest.mark.slow
def test_a_student_is_trained_on_text_embeddings(c, tmp_path):
  """The online teacher is wider; the metrics of `evaluate` are those of numpy."""
  c.tasks = {
    "texts": config.task(
      "text_embeddings",
      path=c.tasks.parity.path,
      max_tokens=32,
      heldout_fraction=0.3,
      tokenizer=c.tasks.parity.tokenizer,
    )
  }
  c.teacher.changes = {"num_labels": 0, "num_hidden_layers": 1, "hidden_size": 48}
  c.student.changes = {"num_labels": 0, "num_hidden_layers": 1}
  c.losses = {"embedding": config.loss("embedding", projection="orthogonal")}
  c.train.records, c.train.online, c.train.steps = (), True, 8
  c.optim.peak_lr = 1e-2
  c.evaluate.models = {"student": f"run:{tmp_path / 'run'}"}
  resolved = config.resolve(c)
  with Workdir(tmp_path / "run", resolved) as folder:
    last = loop.train(resolved, folder)
  first = loop.read_metrics(tmp_path / "run")[0]
  assert last["embedding"] < 0.8 * first["embedding"]
  rows = evaluate.run(resolved, tmp_path)["models"]
  assert rows["teacher"]["spearman"] == pytest.approx(1) and rows["teacher"]["same_nearest"] == 1
  assert -1 <= rows["student"]["spearman"] <= 1


def test_similarity_of_models_is_the_rank_correlation_of_their_cosines():
  turn = np.array([0.0, 0.1, 0.5, 1.7])  # angles: neighbours are 0-1, 1-0, 2-1, 3-2
  circle = lambda a: np.stack([np.cos(a), np.sin(a)], -1).astype(np.float32)
  assert similarity.agreement(circle(turn), circle(2 + turn)) == {
    "spearman": pytest.approx(1.0),
    "same_nearest": 1.0,
  }
  # Apart by 1, 5, 17, 4, 16, 12 and by 2, 9, 3, 7, 1, 6 tenths: ranks 1 3 6 2 5 4, 2 6 3 5 1 4,
  # whose differences have 44 for the sum of squares.
  scores = similarity.agreement(circle(np.array([0.0, 0.2, 0.9, 0.3])), circle(turn))
  assert scores["spearman"] == pytest.approx(1 - 6 * 44 / (6 * 35))
  assert scores["same_nearest"] == 0.25  # the nearest are 1 3 3 1 and 1 0 1 2
