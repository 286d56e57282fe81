"""Exports straight from a checkpoint: the same files as from memory, and resumable."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import slow
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIG

from distill_jax import registry
from distill_jax.errors import InputError, Unavailable
from distill_jax.hub import declared, export, export_folder, tensors
from distill_jax.models import llama
from distill_jax.nn import layers, params, quantise, sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import checkpoint, checksums, remote_files, saved_arrays

ROOT = Path(__file__).parents[2]
EXTRA = {"tokenizer": None, "generation": {}, "card": "# card\n"}
FAMILIES = [f for f in registry.names("models") if "tiny" in registry.load("models", f).CONFIGS]


def save(folder, model, step=1):
  with checkpoint.manager(folder) as saves:
    checkpoint.save(saves, step, {"params": model, "step": np.int32(step)}, {})
  return folder


def export_saved(model, folder, to, **kwargs):
  abstract = jax.eval_shape(lambda: model)
  with saved_arrays.open_arrays(folder) as saved:
    export.export_model(abstract, to, saved=saved, **EXTRA | kwargs)
  return to


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def model():
  return jax.jit(lambda key: llama.Model(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
  return save(tmp_path_factory.mktemp("run"), model)


@pytest.fixture
def small_parts(monkeypatch):
  """Parts and chunks so small that each tensor has several, which do not end together."""
  monkeypatch.setattr(tensors, "PART_BYTES", 1500)
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 700)
  monkeypatch.setattr(declared, "BLOCK", 200)


FAST = ("llama", "deepseek_v3", "whisper")


@pytest.mark.parametrize("family", slow.all_but(FAST, FAMILIES))
def test_the_files_are_those_from_memory(family, small_parts, tmp_path):
  made = registry.load("models", family)
  model = jax.jit(lambda key: made.Model(made.CONFIGS["tiny"], key))(jax.random.key(0))
  save(tmp_path, model)
  export.export_model(model, tmp_path / "a", **EXTRA, shard_bytes=60_000)
  export_saved(model, tmp_path, tmp_path / "b", shard_bytes=60_000)
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("grid", ["int4", "Q4_0"])
@pytest.mark.parametrize("where", ["memory", "checkpoint"])
def test_integers_are_rounded_part_by_part(grid, where, model, run, small_parts, tmp_path):
  """The files are those of the model that was rounded before, as in training."""
  spec = QuantiseOptions(grid)
  rounded = jax.jit(quantise.tree, static_argnums=1)(model, spec)
  export.export_model(rounded, tmp_path / "a", **EXTRA)
  if where == "memory":
    export.export_model(model, tmp_path / "b", quantise=spec, **EXTRA)
  else:
    export_saved(model, run, tmp_path / "b", quantise=spec)
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("grid, bad", [("int8", np.nan), ("Q8_0", np.inf)])
def test_a_number_without_a_place_on_the_grid_is_refused(grid, bad, model, tmp_path):
  v = model.layers.up
  broken = params.replace(model, {"layers.up": v[...].at[2, 5, 7].set(bad)})
  with pytest.raises(InputError, match=rf"layers\.2\.mlp\.up.* contains {bad}.*cannot be rounded"):
    export.export_model(broken, tmp_path / "out", quantise=QuantiseOptions(grid), **EXTRA)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [False, True])
def test_a_parameter_may_be_read_for_two_tensors(wrong, run, model, tmp_path):
  """Each reading is compared with the checksum on its own."""
  found = tensors.tensors_of(jax.eval_shape(lambda: model), np.dtype(np.float32))
  plain = [t for t in found if "up_proj" in t.name]
  again = [
    tensors.Encoded(f"{t.name}.half", t, lambda x: x[:, ::2], (64, 16), t.dtype, readers=1)
    for t in plain[wrong:]
  ]
  shards, _ = export.safetensors_shards([*plain, *again], 10**9)
  with saved_arrays.open_arrays(run) as saved:
    content = export.content_of(jax.eval_shape(lambda: model), shards, {}, saved)
    if wrong:  # one layer has not been read again
      with pytest.raises(InputError, match=r"the checksum of layers\.up differs"):
        export_folder.write(tmp_path / "out", content)
    else:
      export_folder.write(tmp_path / "out", content)
      made = load_file(tmp_path / "out/model.safetensors")
      for t in plain:
        np.testing.assert_array_equal(made[f"{t.name}.half"], made[t.name][:, ::2])


def test_a_checkpoint_of_a_mesh(small_parts, tmp_path):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  init = lambda key: llama.Model(CONFIG, key)
  where = sharding.shardings(
    jax.eval_shape(init, jax.random.key(0)), mesh, layers.ComputeConfig().rules
  )
  model = jax.jit(init, out_shardings=where)(jax.random.key(0))
  save(tmp_path, model)
  export.export_model(model, tmp_path / "a", **EXTRA)
  export_saved(model, tmp_path, tmp_path / "b")
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_layers_have_chunks_of_their_own(monkeypatch, model, tmp_path):
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 10_000)
  save(tmp_path, model)
  with saved_arrays.open_arrays(tmp_path) as saved:
    shapes = {path: saved._open(path).chunk_layout.read_chunk.shape for path in saved.about}
  assert shapes["layers.q"] == (1, 32, 4, 8)  # one of four layers
  assert shapes["layers.up"] == (1, 32, 64)
  assert shapes["layers.attn_norm"] == (4, 32)  # small
  assert np.prod(shapes["embed"]) * 4 <= 10_000


def damage(folder):
  # How the arrays are divided among files depends on when they were written.
  files = (folder / "checkpoints/1/state").rglob("d/*")
  file = max(files, key=lambda path: path.stat().st_size)
  raw = bytearray(file.read_bytes())
  for at in range(1000, len(raw), 1000):
    raw[at] ^= 16
  file.write_bytes(raw)


def test_a_damaged_checkpoint_is_not_exported(model, tmp_path):
  save(tmp_path, model)
  damage(tmp_path)
  with pytest.raises(InputError, match="checkpoints/1 is damaged"):
    export_saved(model, tmp_path, tmp_path / "out")
  assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_wrong_value_is_found_by_the_checksum_of_all_slices(
  model, run, tmp_path, monkeypatch, small_parts
):
  read = saved_arrays.SavedArrays.start_reading

  def flipped(self, path, index, sums):
    finish = read(self, path, index, sums)
    if path == "layers.up" and index[0].start == 2 and index[-1].start > 0:
      path_sums = dict(sums)
      x = finish()
      sums.clear(), sums.update(path_sums)
      x.view(np.uint32).reshape(-1)[3] ^= 1
      start = np.array([s.start for s in index], np.uint32)
      found = checksums.part_sums(x, start)
      saved_arrays.add(sums, {path: [int(n) for n in np.asarray(found)]})
      return lambda: x
    return finish

  monkeypatch.setattr(saved_arrays.SavedArrays, "start_reading", flipped)
  with pytest.raises(InputError, match=r"the checksum of layers\.up differs"):
    export_saved(model, run, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_another_model_is_refused(run, tmp_path):
  other = jax.eval_shape(lambda: llama.Model(CONFIG.keep_layers((0, 1)), jax.random.key(0)))
  with pytest.raises(InputError, match="is of another model: layers"):
    export_saved(other, run, tmp_path / "out")


STOPPED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import jax
from tiny_checkpoints import CONFIG
from distill_jax.hub import export, export_folder
from distill_jax.models import llama
from distill_jax.runtime import saved_arrays
write_file, written = export_folder._write_file, []
def kill_in_the_third(path, header, values):
  if len(written) == 2:
    next(values)
    os.kill(os.getpid(), 9)
  written.append(path)
  write_file(path, header, values)
export_folder._write_file = kill_in_the_third
abstract = jax.eval_shape(lambda: llama.Model(CONFIG, jax.random.key(0)))
with saved_arrays.open_arrays(sys.argv[1]) as saved:
  export.export_model(abstract, sys.argv[2], saved=saved, shard_bytes=30_000, tokenizer=None,
                      generation={{}}, card="# card\\n")
"""


@pytest.fixture
def killed(run, tmp_path):
  """A folder with an export that was killed in its third shard."""
  line = [sys.executable, "-c", STOPPED.format(tests=str(ROOT / "tests"))]
  to = tmp_path / "out"
  done = subprocess.run([*line, str(run), str(to)], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == -9, done.stderr
  assert not to.exists()
  work = tmp_path / ".out.tmp"
  assert len(list(work.glob("*.done"))) == 2 and not (work / "config.json").exists()
  return to


def test_a_killed_export_goes_on_after_its_finished_shards(model, run, killed, monkeypatch):
  written = []
  write_file = export_folder._write_file
  monkeypatch.setattr(
    export_folder,
    "_write_file",
    lambda path, *rest: (written.append(path), write_file(path, *rest)),
  )
  export_saved(model, run, killed, shard_bytes=30_000)
  export.export_model(model, killed.parent / "whole", **EXTRA, shard_bytes=30_000)
  assert contents(killed) == contents(killed.parent / "whole")
  shards = json.loads((killed / "model.safetensors.index.json").read_text())["weight_map"]
  assert len([path for path in written if ".out.tmp" in path]) == len(set(shards.values())) - 2
  assert not (killed.parent / ".out.tmp").exists()


def test_another_export_replaces_what_a_killed_one_left(model, run, killed):
  export_saved(model, run, killed, dtype="float32")
  assert {p.name for p in killed.iterdir()} == {"README.md", "config.json", "model.safetensors"}
  assert load_file(killed / "model.safetensors")["model.norm.weight"].dtype == np.float32


def test_two_exports_to_one_folder_are_refused(model, run, tmp_path):
  work = tmp_path / ".out.tmp"
  work.mkdir()
  (work / "shard.done").touch()  # of the first
  with (
    export_folder._locked(work, tmp_path / "out"),
    pytest.raises(InputError, match="Another process is exporting to"),
  ):
    export_saved(model, run, tmp_path / "out")
  assert [path.name for path in work.iterdir()] == ["shard.done"]


def test_shards_are_kept_while_the_checkpoint_cannot_be_read(model, run, tmp_path, monkeypatch):
  write_file, written = export_folder._write_file, []

  def unavailable(path, *rest):
    if len(written) == 2:
      raise Unavailable("gs://bucket cannot be read.")
    written.append(path)
    write_file(path, *rest)

  monkeypatch.setattr(export_folder, "_write_file", unavailable)
  with pytest.raises(Unavailable):
    export_saved(model, run, tmp_path / "out", shard_bytes=30_000)
  monkeypatch.undo()
  kept = {path: Path(path).stat().st_mtime_ns for path in written}
  export_saved(model, run, tmp_path / "out", shard_bytes=30_000)
  there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  assert len(kept) == 2 and all(there[Path(path).name] == time for path, time in kept.items())


def test_a_url(model, run, tmp_path):
  url = "memory://bucket/student"
  export_saved(model, run, url, shard_bytes=30_000)
  export.export_model(model, tmp_path / "out", **EXTRA, shard_bytes=30_000)
  fs = remote_files.resolve(url)[0]
  found = {Path(p).name: fs.cat(p) for p in fs.find("/bucket/student")}
  assert found == contents(tmp_path / "out")
  with pytest.raises(InputError, match="exists, and export does not overwrite"):
    export_saved(model, run, url)


def test_an_interrupted_upload_goes_on(model, run, monkeypatch):
  url = "memory://bucket/interrupted"
  write_file, written = export_folder._write_file, []

  def stop(path, *rest):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(path)
    write_file(path, *rest)

  monkeypatch.setattr(export_folder, "_write_file", stop)
  with pytest.raises(KeyboardInterrupt):
    export_saved(model, run, url, shard_bytes=30_000)
  fs = remote_files.resolve(url)[0]
  assert not fs.exists(f"{url}/config.json")
  monkeypatch.setattr(
    export_folder, "_write_file", lambda *a: (written.append(a[0]), write_file(*a))
  )
  export_saved(model, run, url, shard_bytes=30_000)
  assert len(written) == len(set(written)) == len(fs.glob(f"{url}/*.safetensors"))
  assert fs.exists(f"{url}/config.json") and not fs.glob(f"{url}/*.done")
