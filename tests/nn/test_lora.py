"""Low-rank adapters: PEFT's numbers, a base that stays, a run that resumes, two exports."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import parity
import pytest
import steps as training_steps
import tiny
from safetensors.numpy import load_file, save_file

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.evaluate import run as evaluate
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.hub.pretrained import open_model
from distill_jax.models import deepseek_v3, llama, loading, qwen3, runs
from distill_jax.models.trainables import Lora
from distill_jax.nn import layers, lora, params, sharding
from distill_jax.nn.lora import LoraOptions
from distill_jax.runtime import checkpoint
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop as training
from distill_jax.training.metric_writer import read_metrics

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ALL = LoraOptions().targets
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FAMILIES = {
  "llama": ({}, ALL),
  "qwen3_moe": (
    {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ("self_attn.q_proj", "v_proj", "o_proj"),
  ),
  "deepseek_v3": (parity.DEEPSEEK, LATENT),
}


def random_adapters(model, spec, seed=1):
  """Both factors random: with B at 0, A has no gradient."""
  adapters = lora.init(model, spec, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  draw = lambda v: v.replace(jnp.asarray(rng.normal(0, 0.2, v.shape), jnp.float32))
  return params.map_params(draw, adapters)


def as_stored(adapters) -> dict[str, np.ndarray]:
  return {
    name: declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
    for _, v in params.named_params(adapters)
    for name, at in declared.tensors(v)
  }


def logits(model, tokens_BT, compute=layers.ComputeConfig()):  # noqa: B008
  out = jax.jit(lambda m, i: m(i, compute))(model, parity.plain_inputs(tokens_BT))
  return np.asarray(out.hidden_BTD @ out.head_VD.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_peft_s(family, tmp_path):
  """On the same weights, both factors random; every adapter's gradient of the cross-entropy."""
  changes, targets = FAMILIES[family]
  theirs = parity.torch_model(family, **changes)
  base, spec = (
    parity.ours_from(theirs, tmp_path),
    LoraOptions(rank=3, alpha=4.0, targets=targets),
  )
  adapters, tokens_BT = random_adapters(base, spec), parity.tokens()
  theirs = peft.get_peft_model(
    theirs,
    peft.LoraConfig(
      r=3,
      lora_alpha=4.0,
      target_modules=list(targets),
      task_type="CAUSAL_LM",
    ),
  ).eval()
  stored = as_stored(adapters)
  state = peft.get_peft_model_state_dict(theirs)
  assert {n: x.shape for n, x in stored.items()} == {n: tuple(x.shape) for n, x in state.items()}
  given = {n: torch.from_numpy(x.copy()) for n, x in stored.items()}
  peft.set_peft_model_state_dict(theirs, given)
  theirs_tokens = torch.from_numpy(tokens_BT).long()
  out = theirs(theirs_tokens, labels=theirs_tokens)
  out.loss.backward()
  joined = lora.with_adapters(base, adapters)
  assert parity.error(logits(joined, tokens_BT), out.logits.detach()) < parity.FORWARD

  def loss(adapters):
    out = lora.with_adapters(base, adapters)(parity.plain_inputs(tokens_BT), layers.ComputeConfig())
    logp_BTV = jax.nn.log_softmax(out.hidden_BTD[:, :-1] @ out.head_VD.T)
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  got = as_stored(jax.jit(jax.grad(loss))(adapters))
  name = lambda n: n.replace(".default.", ".")
  want = {name(n): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
  assert got.keys() == want.keys()
  worst = max((parity.error(got[n], want[n]), n) for n in want)
  assert worst[0] < parity.GRADIENT, worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_training_it_is_the_base(dtype):
  """B is 0, so every output is the base's, bit for bit."""
  compute, tokens_BT = layers.ComputeConfig(dtype=dtype), parity.tokens()
  base = jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(0))
  joined = lora.with_adapters(base, lora.init(base, LoraOptions(rank=2), jax.random.key(1)))
  np.testing.assert_array_equal(
    logits(joined, tokens_BT, compute), logits(base, tokens_BT, compute)
  )


def test_a_starts_as_peft_draws_it():
  """Uniform between -1/sqrt(inputs) and 1/sqrt(inputs): torch's Linear, which PEFT takes over."""
  base = llama.Model(llama.TINY, jax.random.key(0))
  adapters = lora.init(
    base, LoraOptions(rank=32, targets=("o_proj", "down_proj")), jax.random.key(1)
  )
  assert sorted(adapters) == ["layers.down", "layers.o"]
  for path, inputs in {"layers.o": 32, "layers.down": 64}.items():
    a, b = np.asarray(adapters[path].a[...]), np.asarray(adapters[path].b[...])
    module = torch.nn.Linear(inputs, 32, bias=False)
    torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)  # what peft's LoraLayer does
    bound = float(module.weight.detach().abs().max())
    assert np.abs(a).max() == pytest.approx(bound, rel=0.01)
    assert np.std(a) == pytest.approx(float(module.weight.detach().std()), rel=0.05)
    assert len(np.unique(a)) > a.size * 0.99  # no layer repeats another
    assert not b.any()


def test_merging_is_the_dense_formula():
  base = llama.Model(llama.TINY, jax.random.key(0))
  adapters = random_adapters(base, LoraOptions(rank=3, alpha=5.0, targets=("q_proj", "o_proj")))
  whole = lora.merge_adapters(base, adapters)
  f = lambda v: np.float64(v[...])
  pair = adapters["layers.q"]
  q = f(base.layers.q) + 5 / 3 * np.einsum("LDr,LrHh->LDHh", f(pair.a), f(pair.b))
  np.testing.assert_allclose(whole.layers.q[...], q, atol=1e-6)
  pair = adapters["layers.o"]
  o = f(base.layers.o) + 5 / 3 * np.einsum("LHhr,LrD->LHhD", f(pair.a), f(pair.b))
  np.testing.assert_allclose(whole.layers.o[...], o, atol=1e-6)
  for (path, v), (_, was) in zip(
    params.named_params(whole), params.named_params(base), strict=True
  ):
    assert v.get_metadata() == was.get_metadata()
    if path not in adapters:
      np.testing.assert_array_equal(v[...], was[...])
  half = params.map_params(lambda v: v.replace(v[...].astype(jnp.bfloat16)), base)
  assert {x.dtype for x in jax.tree.leaves(lora.merge_adapters(half, adapters))} == {
    jnp.dtype("bfloat16")
  }


def steps(mesh_shape=(1, 1, 1), spec=LoraOptions(rank=4), **changes):  # noqa: B008
  """(adapters, base before, base after, metrics) of three steps."""
  step = training_steps.make_step(trainable=Lora(options=spec), **changes)
  mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
  make = lambda key: llama.Model(llama.TINY, key)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(make, jax.random.key(0))
    where = sharding.shardings(shapes, mesh, step.student.rules)
    base = jax.jit(make, out_shardings=where)(jax.random.key(0))
    before = jax.device_get(base)
    init = lambda key: step.init(lora.init(shapes, spec, key))
    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh, step.student.rules)
    state = jax.jit(init, out_shardings=where)(jax.random.key(7))
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    rows = []
    for n in range(3):
      batch = jax.device_put(training_steps.make_batch(n), sharding.batch_sharding(mesh))
      state, metrics = step_fn(state, batch, {}, base)
      rows.append({k: float(v) for k, v in metrics.items()})
  return jax.device_get(state.params), before, jax.device_get(base), rows


@pytest.fixture(scope="module")
def reference():
  return steps()


def test_only_adapters_change(reference):
  adapters, before, after, _ = reference
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert all(np.abs(p.b[...]).max() > 0 for p in adapters.values())


def test_mesh_does_not_change_training(reference):
  adapters, _, _, rows = steps((1, 2, 2))
  for row, want in zip(rows, reference[3], strict=True):
    for name in want:
      assert row[name] == pytest.approx(want[name], rel=1e-5), name
  for got, want in zip(jax.tree.leaves(adapters), jax.tree.leaves(reference[0]), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)  # 1% of one of Adam's first updates


def test_adapters_are_sharded_as_their_weight_is():
  base = jax.eval_shape(lambda: llama.Model(llama.TINY, jax.random.key(0)))
  adapters = lora.init(base, LoraOptions(rank=4, targets=("q_proj",)), jax.random.key(0))
  where = sharding.shardings(adapters, sharding.make_mesh(1, 2, 2), sharding.Rules())
  assert where["layers.q"].a.get_value().spec == jax.P(None, "fsdp", None)
  assert where["layers.q"].b.get_value().spec == jax.P(None, None, "tensor", None)


def test_neither_microbatches_nor_remat_change_training(reference):
  rows = steps(accumulate=4, student=layers.ComputeConfig(remat="dots"))[3]
  for name in ("loss", "grad_norm", "soft", "hard"):
    assert rows[-1][name] == pytest.approx(reference[3][-1][name], rel=1e-5), name


def test_queries_and_keys_that_a_loss_compares_are_the_adapted_ones():
  base = llama.Model(llama.TINY, jax.random.key(0))
  adapters = random_adapters(base, LoraOptions(rank=2))
  inputs = parity.plain_inputs(parity.tokens())
  x_BTD = jax.random.normal(jax.random.key(1), (*inputs.tokens_BT.shape, 32))
  of = lambda model: model.qkv(1, x_BTD, inputs, layers.ComputeConfig())
  joined, merged = of(lora.with_adapters(base, adapters)), of(lora.merge_adapters(base, adapters))
  for a, b, was in zip(joined, merged, of(base), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - was).max() > 0.1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_no_second_copy_of_the_model_is_kept(remat):
  """What the backward pass holds on to: nothing of a stack's shape but the base itself."""
  base = llama.Model(llama.TINY, jax.random.key(0))
  adapters, compute = (
    random_adapters(base, LoraOptions(rank=2)),
    layers.ComputeConfig(remat=remat),
  )
  inputs = parity.plain_inputs(parity.tokens())
  _, pull = jax.vjp(lambda a: lora.with_adapters(base, a)(inputs, compute).hidden_BTD, adapters)
  weights = {path: np.asarray(v[...]) for path, v in params.named_params(base) if path in adapters}
  shapes = {w.shape for w in weights.values()}
  kept = [np.asarray(x) for x in jax.tree.leaves(pull) if x.shape in shapes]
  assert all(any(np.array_equal(x, w) for w in weights.values()) for x in kept)


def train(c, workdir):
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return training.train(resolved, path)


def lora_config(folder):
  """A student with adapters on a folder's weights, beside a teacher of its own shape."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.student.source = str(folder / "base")
  c.student.train, c.student.lora.rank = "lora", 4
  c.student.lora.targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("lora")
  shape = {k: v for k, v in llama.TINY.to_hf().items() if k != "model_type"}
  model = parity.torch_model("llama", **shape)
  model.save_pretrained(path / "base")
  c = lora_config(path)
  record(config.resolve(c), path / "records")
  train(c, path / "whole")
  return path


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder):
  shutil.copytree(folder / "whole", folder / "stopped")
  shutil.rmtree(folder / "stopped" / "checkpoints" / "6")
  train(lora_config(folder), folder / "stopped")
  mesh = sharding.make_mesh()
  whole, stopped = (loading.open_run(folder / name).restore(mesh) for name in ("whole", "stopped"))
  jax.tree.map(np.testing.assert_array_equal, whole, stopped)
  mine = lambda name: [{k: r[k] for k in ("step", "loss", "grad_norm")} for r in read_metrics(name)]
  assert mine(folder / "whole") == mine(folder / "stopped")
  rows = read_metrics(folder / "whole")
  assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_checkpoint_holds_adapters_alone(folder):
  """And their two moments: no number of the base."""
  where = folder / "whole" / "checkpoints" / "6" / checkpoint.STATE
  held = ocp.PyTreeCheckpointer().metadata(where).item_metadata.tree
  numbers = sum(int(np.prod(x.shape)) for x in held.values() if x.shape)
  adapters = loading.open_run(folder / "whole").restore(sharding.make_mesh())
  assert numbers == 3 * params.count(adapters)
  assert {path for path in held if path.startswith("params.")} == {
    f"params.layers.{name}.{part}" for name in ("q", "v", "o", "gate", "down") for part in "ab"
  }


def exported(folder, compute):
  """Once a module."""
  c, out = lora_config(folder), folder / f"export-{compute}"
  c.export.dir, c.export.lora, c.export.dtype = str(out), compute, "float32"
  if not out.exists():
    export.run(config.resolve(c), folder / "whole")
  return out


def test_every_export_is_the_model_that_was_trained(folder):
  """Merged, or PEFT's adapters on the exported base: logits as of base and adapters, joined."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  opened = open_model(str(folder / "base"))
  base = load.load_model(opened, mesh, layers.ComputeConfig())
  adapters = loading.open_run(folder / "whole").restore(mesh)
  tokens_BT = parity.tokens() % llama.TINY.vocab_size
  ours = logits(lora.with_adapters(base, adapters), tokens_BT)
  assert parity.error(logits(base, tokens_BT), ours) > 0.01  # something was learnt
  auto = transformers.AutoModelForCausalLM

  def error(model):
    with torch.no_grad():
      return parity.error(model(torch.from_numpy(tokens_BT).long()).logits, ours)

  assert error(auto.from_pretrained(exported(folder, "merged")).eval()) < parity.FORWARD
  at = exported(folder, "peft")
  on = auto.from_pretrained(exported(folder, "base"))
  assert error(peft.PeftModel.from_pretrained(on, at).eval()) < parity.FORWARD
  assert error(peft.AutoPeftModelForCausalLM.from_pretrained(at).eval()) < parity.FORWARD
  about = json.loads((at / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] == str(folder / "base")
  assert (about["r"], about["lora_alpha"], about["peft_type"]) == (4, 16.0, "LORA")
  assert not (at / "config.json").exists() and (at / "tokenizer.json").exists()
  card = (at / "README.md").read_text()
  assert "rank 4, alpha 16, on q_proj, v_proj, o_proj, gate_proj, down_proj" in card


def test_the_base_is_exported_as_it_came(folder):
  """And in the merged export every weight without adapters is its, bit for bit."""
  pretrained = load_file(folder / "base" / "model.safetensors")
  base = load_file(exported(folder, "base") / "model.safetensors")
  whole = load_file(exported(folder, "merged") / "model.safetensors")
  assert pretrained.keys() == base.keys() == whole.keys()
  targets = lora_config(folder).student.lora.targets
  for name in pretrained:
    np.testing.assert_array_equal(pretrained[name], base[name], err_msg=name)
    adapted = name.split(".")[-2] in targets
    assert np.array_equal(pretrained[name], whole[name]) != adapted, name


def test_evaluate_and_a_teacher_out_of_a_run_of_adapters(folder):
  """`start` is the base; a run is its base and adapters, as a student's or a teacher's source."""
  c = lora_config(folder)
  c.evaluate.models = {"mine": f"run:{folder / 'whole'}", "merged": str(exported(folder, "merged"))}
  c.evaluate.batch_size = 4
  models = evaluate(config.resolve(c), folder)["models"]
  assert models["mine"]["kl"] < models["start"]["kl"]
  assert models["mine"]["ce"] == pytest.approx(models["merged"]["ce"], rel=1e-6)
  assert models["mine"]["parameters"] == models["start"]["parameters"]
  c.teacher.source = f"run:{folder / 'whole'}"
  spec = config.resolve(c).teacher
  before = loading.open_source(spec, 0).identity["digest"]
  assert (
    before != loading.open_source(config.resolve(lora_config(folder)).student, 0).identity["digest"]
  )


@pytest.mark.slow
def test_a_random_base_in_bfloat16_and_a_projection_fitted_beside_it(folder):
  """The base follows from the seed; adapters stay float32; PEFT is told of no base to load."""
  c = lora_config(folder)
  c.student.source = ""
  c.student.param_dtype = c.student.dtype = "bfloat16"
  c.student.remat = "dots"
  c.records.taps, c.records.taps_width = (1,), 48
  c.losses = {"hidden": config.loss("hidden", layers="2:1", projection="least_squares")}
  c.train.records, c.train.steps = (str(folder / "taps"),), 2
  record(config.resolve(c), folder / "taps")
  train(c, folder / "random")
  # Unfitted it is 0.85; 32 numbers of 124 positions can explain half of what they should.
  assert read_metrics(folder / "random")[0]["hidden"] < 0.6
  mesh = sharding.make_mesh()
  adapters = loading.open_run(folder / "random").restore(mesh)
  assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
  spec, key = config.resolve(c).student, runs.keys(0)["student"]
  base = loading.open_source(spec).load(mesh, key).model
  of_run = config.StudentOptions(source=f"run:{folder / 'random'}", param_dtype="bfloat16")
  jax.tree.map(
    np.testing.assert_array_equal,
    loading.open_source(of_run).load(mesh, key).model,
    lora.merge_adapters(base, adapters),
  )
  c.export.dir, c.export.lora = str(folder / "random-peft"), "peft"
  export.run(config.resolve(c), folder / "random")
  about = json.loads((folder / "random-peft" / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] is None


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"rank": -1}, "rank -1 and alpha 16; the rank is at least 1"),
    ({"alpha": 0.0}, "rank 4 and alpha 0; .* alpha a positive number"),
    ({"alpha": float("nan")}, "alpha nan"),
    ({"rank": 33}, "rank is 33 and layers.q is 32 by 32; the rank is at most 32"),
    ({"rank": 17, "targets": ("k_proj",)}, "layers.k is 32 by 16; the rank is at most 16"),
    ({"targets": ()}, r"targets is \(\); name modules"),
    ({"targets": ("q_proj", "q_proj")}, "name modules, each once"),
    ({"targets": ("q_prj",)}, "names 'q_prj' and the student has down_proj, .*q_proj, up_proj"),
    ({"targets": ("roj",)}, "names 'roj' and the student has"),
    ({"targets": ("lm_head",)}, "names 'lm_head' and the student has"),
  ],
)
def test_adapters_that_do_not_fit_are_refused_before_anything_runs(folder, changes, said):
  c = lora_config(folder)
  for key, value in changes.items():
    c.student.lora[key] = value
  with pytest.raises(InputError, match=said):
    train(c, folder / f"refused-{abs(hash(said))}")


@pytest.mark.parametrize("family", [qwen3, deepseek_v3])
@pytest.mark.parametrize("target", ["gate_proj", "mlp.gate", "experts.{experts}.down_proj"])
def test_experts_are_refused_by_name(family, target):
  shape = family.CONFIGS["tiny-moe" if family is qwen3 else "tiny"]
  model = jax.eval_shape(lambda: family.Model(shape, jax.random.key(0)))
  said = f"names '{target}', which in the student are experts.*name some of .*o_proj"
  with pytest.raises(InputError, match=said):
    lora.targets(model, LoraOptions(rank=2, targets=("o_proj", target)))


def test_a_teacher_has_no_adapters(folder):
  tree = lora_config(folder).to_dict()
  tree["teacher"]["lora"] = {"rank": 2}
  with pytest.raises(InputError, match="'teacher.lora' is unknown"):
    config.from_dict(tree)


@pytest.fixture
def another_norm(folder):
  """The base's weights changed under the run."""
  file = folder / "base" / "model.safetensors"
  pretrained = file.read_bytes()
  weights = load_file(file)
  weights["model.norm.weight"] = weights["model.norm.weight"] + 1
  save_file(weights, file, {"format": "pt"})
  yield
  file.write_bytes(pretrained)


def test_another_base_is_refused(folder, tmp_path, another_norm):
  """Neither resumed, nor exported, nor taken as a teacher."""
  run, c = shutil.copytree(folder / "whole", tmp_path / "run"), lora_config(folder)
  shutil.rmtree(run / "checkpoints" / "6")
  said = "were trained on .*base with digest .* and it now has"
  with pytest.raises(InputError, match=said):
    train(c, run)
  c.export.dir = str(tmp_path / "out")
  for compute in ("merged", "peft", "base"):
    c.export.lora = compute
    with pytest.raises(InputError, match=said):
      export.run(config.resolve(c), run)
  with pytest.raises(InputError, match=said):
    loading.open_source(config.ModelOptions(source=f"run:{run}")).load(
      sharding.make_mesh(), jax.random.key(0)
    )
  (run / "base.json").unlink()
  with pytest.raises(InputError, match="holds adapters and no base.json"):
    export.run(config.resolve(c), run)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "compute, rank, said",
  [
    ("adapter", 4, "export.lora is 'adapter' and adapters were trained; expected one of"),
    ("peft", 0, "export.lora is 'peft' and adapters were not trained"),
  ],
)
def test_exports_that_make_no_sense(folder, compute, rank, said):
  c = lora_config(folder)
  c.export.lora, c.export.dir = compute, str(folder / "none")
  if not rank:
    c.student.train, c.student.lora = "whole", config.base().student.lora
  with pytest.raises(InputError, match=said):
    export.run(config.resolve(c), folder / "whole")
  assert not (folder / "none").exists()


def test_a_failed_export_leaves_nothing(folder, monkeypatch):
  from distill_jax.hub import peft as module

  def full(*_):
    raise OSError("no space left")

  monkeypatch.setattr(module, "write_shard", full)
  c = lora_config(folder)
  c.export.dir, c.export.lora = str(folder / "failed"), "peft"
  with pytest.raises(OSError, match="no space"):
    export.run(config.resolve(c), folder / "whole")
  assert not [p for p in folder.iterdir() if "failed" in p.name]
