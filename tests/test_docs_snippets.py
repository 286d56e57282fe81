"""The code of docs/api.md, run from top to bottom in one namespace, as a reader would."""

import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import distill_jax as dj

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
BLOCK = re.compile(r'^```python(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$', re.M | re.S)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """(namespace after all blocks without a title, the blocks with one by their titles)."""
  folder = tmp_path_factory.mktemp("api")
  (folder / "models").mkdir()
  random = dj.load_model(family="llama", shape="tiny")
  dj.export_model(random, folder / "models" / "teacher", dtype="float32")
  tiny.write_tokenizer(folder / "models" / "teacher" / "tokenizer.json")
  text = PAGE.read_text(encoding="utf-8")
  namespace, titled, before = {"__name__": "page"}, {}, Path.cwd()
  os.chdir(folder)
  try:
    with jax.numpy_rank_promotion("allow"):  # as it is for readers
      for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        if block["title"]:
          titled[block["title"]] = block["code"]
        else:
          exec(compile("\n" * line + block["code"], str(PAGE), "exec"), namespace)
    yield namespace, titled
  finally:
    os.chdir(before)


def test_the_loops_of_the_page_learn(page):
  namespace, _ = page
  for name in ("online_history", "history"):
    losses = namespace[name]
    assert np.mean(losses[-5:]) < 0.7 * losses[0], (name, losses)


def test_the_store_of_the_page_is_whole(page):
  namespace, _ = page
  store = namespace["store"]
  store.verify()
  assert store.manifest.teacher["name"] == "two tables"
  assert namespace["batch"] is not None


def test_the_exported_model_is_the_trained_one(page):
  namespace, _ = page
  assert namespace["again"].config.num_hidden_layers == 2
  assert namespace["again"].tokenizer.digest == namespace["loaded"].tokenizer.digest
  assert load_file("models/student/model.safetensors")


@pytest.mark.slow
def test_tunix_trains_on_the_store_of_the_page(page, capsys):
  pytest.importorskip("tunix", reason="google-tunix is not installed")
  namespace, titled = page
  seen = []
  code = titled["tunix_loop.py"]
  with jax.numpy_rank_promotion("allow"):
    exec(code.replace("trainer.train(", "train_on = ("), namespace)
    trainer, model = namespace["trainer"], namespace["trainer"].model
    batch = next(iter(namespace["train_on"]))

    def loss():
      fields = (batch.input_tokens, batch.input_mask)
      return float(namespace["distillation_loss"](model, *fields, **batch.teacher_output))

    seen.append(loss())
    trainer.train(namespace["train_on"])
    seen.append(loss())
  with capsys.disabled():
    print(f"\nTunix: the loss went from {seen[0]:.3f} to {seen[1]:.3f} in 30 steps")
  assert seen[1] < seen[0] - 0.2
  assert type(batch).__name__ == "TunixInput" and batch.positions.shape == batch.input_tokens.shape


def test_torch_trains_on_the_store_of_the_page(page):
  """The loss is the cross-entropy: KD of the same logits, and the teacher's entropy."""
  torch = pytest.importorskip("torch", reason="torch is not installed")
  namespace, titled = page
  torch.manual_seed(0)
  with jax.numpy_rank_promotion("allow"):
    exec(titled["torch_loop.py"], namespace)
  batch, network, store = (namespace[name] for name in ("batch", "network", "store"))
  first = next(iter(store.as_dataset("batch", batch_size=8)))
  rows = torch.utils.data.default_collate([store.example(i) for i in range(8)])
  with torch.no_grad():
    logits = network(rows["inputs"])
    got = float(namespace["distillation_loss"](logits, rows))
  kd, _ = dj.logits_loss({"soft": dj.losses.KD()}, logits.numpy(), first)
  entropy = np.mean(first.targets["teacher"].entropy_BT[first.mask_BT])
  assert got == pytest.approx(float(kd) + entropy, rel=1e-5)  # sums of float32
  assert batch["inputs"].shape == (8, 32)
  assert got < np.log(256) - 0.2  # which is that of a uniform distribution
