"""`filter`: kept and rejected samples, with every sample in one of the files."""

import dataclasses
import json
import random
from collections import Counter

import pytest
from json_lines import read_lines
from tiny_samples import a_sample, group, write

from distill_jax import config, filters, registry
from distill_jax.commands.filter import run as filter_samples
from distill_jax.errors import InputError

OUTPUTS = ("kept", "rejected")
KEPT, REJECTED = "kept/00000.jsonl", "rejected/00000.jsonl"


def raw(number, texts, **fields):
  return [
    {k: v for k, v in sample.items() if k != "of"} for sample in group(number, texts, **fields)
  ]


def verb(tmp_path, rows, on_bad="stop", **filters):
  tmp_path.mkdir(exist_ok=True)
  write(tmp_path / "samples.jsonl", rows)
  c = config.base()
  c.filter.samples = str(tmp_path / "samples.jsonl")
  c.filter.on_bad = on_bad
  c.filter.order = tuple(filters)
  for name, made in filters.items():
    c.filters[name] = made
  resolved = config.resolve(c)
  assert config.from_dict(json.loads(json.dumps(config.to_dict(resolved)))) == resolved
  return filter_samples(resolved, tmp_path)


def test_filters_run_in_order_and_keep_or_reject_every_sample(tmp_path):
  rows = raw(0, ["it is 4", "it is 5", "it is 4", "4" * 99], answer="4")
  rows += (
    raw(1, ["7", "7"], answer="7") + raw(2, ["1", "2"], answer="3") + raw(3, ["9"], answer="9")
  )
  result = verb(
    tmp_path,
    rows,
    short=config.filter("length", max_chars=50),
    right=config.filter("math"),
    rate=config.filter("pass_rate", at_most=0.9),
    vote=config.filter("votes", one=True),
  )
  kept, rejected = read_lines(tmp_path / KEPT), read_lines(tmp_path / REJECTED)
  assert [(r["id"], r["sample"], r["agreement"]) for r in kept] == [(0, 0, 0.5)]
  by = {
    "short": {"too long": 1},
    "right": {"wrong": 3},
    "rate": {"too easy": 3},
    "vote": {"another sample with this answer is kept": 1},
  }
  assert result == {"samples": 9, "kept": 1, "rejected": 8, "rejected_by": by}
  assert {
    k: v
    for k, v in json.loads((tmp_path / "filter.json").read_text()).items()
    if k not in ("of", "source")
  } == result
  counted = Counter((r["rejected"]["by"], r["rejected"]["why"]) for r in rejected)
  assert counted == {(f, w): n for f, whys in by.items() for w, n in whys.items()}
  bare = lambda r: json.dumps({k: r[k] for k in rows[0]}, sort_keys=True)
  assert Counter(map(bare, kept + rejected)) == Counter(map(bare, rows))
  assert {p.name for p in tmp_path.iterdir()} == {*OUTPUTS, "samples.jsonl", "filter.json"}
  before = (tmp_path / KEPT).read_bytes(), (tmp_path / REJECTED).read_bytes()
  assert filter_again(tmp_path, rows) == result
  assert before == (
    (tmp_path / KEPT).read_bytes(),
    (tmp_path / REJECTED).read_bytes(),
  )


def filter_again(tmp_path, rows):
  return verb(
    tmp_path,
    rows,
    short=config.filter("length", max_chars=50),
    right=config.filter("math"),
    rate=config.filter("pass_rate", at_most=0.9),
    vote=config.filter("votes", one=True),
  )


@pytest.mark.parametrize(
  "name", [n for n in registry.names("filters") if n not in ("math", "code")] + ["math"]
)
def test_every_filter_keeps_or_rejects_every_sample(name, tmp_path):
  rng = random.Random(name)
  pieces = ["4", "\\boxed{", "}", "<think>", "</think>", "所以", "\ud800", "\n", "####", " ", "yes"]
  rows: list = []
  for number in range(20):
    for i in range(rng.randrange(1, 4)):
      row = a_sample("".join(rng.choices(pieces, k=rng.randrange(12))), id=number, sample=i)
      row["about"] = {"answer": rng.choice(["4", "", None, "\\frac{"])}
      for field in ("token_count", "logprob_mean", "reason", "prompt"):
        if rng.random() < 0.2:
          row[field] = rng.choice([None, "x", -1.0, [], [{"role": "user"}]])
      row.pop("of")
      rows.append(row)
  rows.insert(7, "[1]\n")
  rows.insert(9, '{"id": 1\n')
  rows.insert(9, "\n")
  write(tmp_path / "eval.jsonl", [{"q": "one two three four five six seven eight"}])
  need = {
    "pseudo_label": {"labels": ("yes",)},
    "decontaminate": {"against": (str(tmp_path / "eval.jsonl"),)},
  }
  made = config.filter(name, **need.get(name, {}))
  result = verb(tmp_path, rows, "skip", it=made)
  out = read_lines(tmp_path / KEPT) + read_lines(tmp_path / REJECTED)
  assert result["samples"] == len(out) == len(rows) - 1
  assert result["rejected_by"]["read"] == {"not a sample": 1, "not JSON": 1}
  good = [r for r in rows if isinstance(r, dict)]
  bare = lambda r: json.dumps({k: r[k] for k in good[0]}, sort_keys=True)
  assert Counter(map(bare, good)) == Counter(bare(r) for r in out if "line" not in r)
  with pytest.raises(InputError, match=r"samples.jsonl, (line|prompt) \d+.*: .*filter.on_bad=skip"):
    verb(tmp_path, rows, "stop", it=made)


def test_a_bad_key_stops_or_is_counted(tmp_path):
  rows = raw(0, ["4", "4"], answer="\\frac{") + raw(1, ["4"], answer="4")
  with pytest.raises(InputError, match="prompt 0, sample 0: .*key cannot be parsed.*frac"):
    verb(tmp_path, rows, right=config.filter("math"))
  assert not (tmp_path / KEPT).exists() and not (tmp_path / "filter.json").exists()
  result = verb(tmp_path, rows, "skip", right=config.filter("math"))
  assert result["kept"] == 1
  assert result["rejected_by"] == {"right": {"the key cannot be parsed": 2}}


def test_bad_configs_and_samples_raise(tmp_path):
  length = config.filter("length")
  with pytest.raises(InputError, match="filters is empty"):
    verb(tmp_path, [])
  with pytest.raises(InputError, match="filter.order is .*each name in filters once"):
    c = config.base()
    c.filters.a, c.filters.b = length, length
    filter_samples(config.resolve(c), tmp_path)
  with pytest.raises(InputError, match="not together"):
    verb(tmp_path, [*raw(0, ["a"]), *raw(1, ["a"]), *raw(0, ["b"])], it=length)
  with pytest.raises(InputError, match="on_bad is 'go'"):
    verb(tmp_path, [], "go", it=length)
  with pytest.raises(
    InputError, match="distill_jax/filters has no module 'lenght'. Did you mean 'length'"
  ):
    config.filter("lenght")
  with pytest.raises(InputError, match="did you mean 'max_chars'"):
    config.filter("length", max_char=3)
  c = config.base()
  c.filters.a, c.filters.b = config.filter("near_duplicates"), length
  c.filter.order = ("a", "b")
  with pytest.raises(InputError, match=r"filter.order is .* last \(a\). Set it to \('b', 'a'\)"):
    filter_samples(config.resolve(c), tmp_path)
  for part in ("3", "2/2", "-1/4", "0/0", "1/2/3"):
    with pytest.raises(InputError, match="filter.slice is .*e.g. 3/16"):
      c.filter.order, c.filter.slice = ("b", "a"), part
      filter_samples(config.resolve(c), tmp_path)
  (tmp_path / "samples.jsonl").unlink()
  with pytest.raises(InputError, match="filter.samples is .*expected an existing file"):
    c = config.base()
    c.filters.it = length
    filter_samples(config.resolve(c), tmp_path)
  assert verb(tmp_path, [], it=length) == {
    "samples": 0,
    "kept": 0,
    "rejected": 0,
    "rejected_by": {},
  }


def test_every_filter_has_a_docstring_and_a_filter_class():
  for name in registry.names("filters"):
    module = registry.load("filters", name)
    assert module.__doc__ and dataclasses.is_dataclass(module.Filter)
    methods = {
      filters.SampleFilter: "reject_reason",
      filters.ComparingFilter: "compare",
      filters.Filter: "select",
    }
    kind = next(kind for kind in methods if issubclass(module.Filter, kind))
    assert methods[kind] in vars(module.Filter)
    assert config.filter(name)["filter"] == name
