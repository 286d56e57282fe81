"""Filters and their verb: each keeps what is good, names what is not, and loses nothing."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distill_jax import config, filters, registry
from distill_jax.commands.filter import run as filter_samples
from distill_jax.errors import InputError
from distill_jax.filters import _runner, answers, code, near_duplicates, repetition
from distill_jax.filters.samples import Unjudgeable


def one(text="so it is 4", **fields):
  about = {k: fields.pop(k) for k in list(fields) if k in ("answer", "test", "entry_point")}
  sample = {"id": 0, "sample": 0, "prompt": "2 + 2?", "about": about, "text": text, "of": 1}
  return sample | {"tokens": [1, 2, 3], "reason": "eos", "logprob_mean": -0.1} | fields


def judge(name, samples, **fields):
  """Why each sample is rejected, of a filter by its name."""
  made = registry.load("filters", name).Filter(**fields)
  out = list(made.select(iter(samples)))
  assert [(s["id"], s["sample"]) for s, _ in out] == [(s["id"], s["sample"]) for s in samples]
  return [why for _, why in out]


def kind(why):
  return why and why.partition(": ")[0]


def kinds(name, samples, **fields):
  return [kind(why) for why in judge(name, samples, **fields)]


# Answers


EQUAL = [
  (r"\frac12", "0.5"),
  ("1/2", r"\dfrac{1}{2}"),
  (r"336^\circ", "336"),
  ("336", r"336^\circ"),
  ("1,000", "1000"),
  (r"5\text{ cm}", "5"),
  (r"\{1,2\}", r"\{2,1\}"),
  ("3", "x=3"),
  (r"\sqrt{8}", r"2\sqrt2"),
  ("x^2+2x+1", "(x+1)^2"),
  (r"\text{B}", "B"),
  ("72", "72.00"),
  ("18", r"\$18"),
  ("18", "18 dollars"),
  (r"3\frac{1}{2}", "7/2"),
  (r"\frac{\pi}{2}", r"0.5\pi"),
  ("Paris", "paris"),
  ("Paris", r"\text{paris}"),
  (r"\text{No}", "no"),
  (r"\text{June 20}", "June 20"),
  ("So 70 + 2 = 72.\n#### 72", "72"),
  ("1000", "1{,}000"),
  (r"1\,000", "1000"),
  (r"\frac{1}{2}", "0.5."),
  ("50", r"50\%"),
  ("[0,1)", "[0, 1)"),
  (r"(0,1)\cup(2,3)", r"(0,1) \cup (2,3)"),
  (r"5\text{ cm}^2", "5"),
  (r"Thus \boxed{\frac{3}{4}}.", "0.75"),
]
OTHER = [
  ("72", "73"),
  ("(1,2)", "(2,1)"),
  ("Paris", "Pairs"),
  (r"\frac12", r"\frac13"),
  ("1000", "1"),
  ("x^2+1", "(x+1)^2"),
  ("No", "On"),
  ("[0,1)", "[0,1]"),
  ("1,2", "1"),
  (r"\text{(C)}", "(D)"),
  ("2", "-2"),
  (r"\sqrt{2}", "1.41"),
]


def test_math_knows_what_is_equal():
  pairs = [*EQUAL, *OTHER]
  samples = [
    one(rf"I try \boxed{{1234}} first. Then \boxed{{{a}}}, done in 7.", answer=key, sample=i)
    for i, (key, a) in enumerate(pairs)
  ]
  want = [None] * len(EQUAL) + ["wrong"] * len(OTHER)
  assert list(zip(pairs, kinds("math", samples), strict=True)) == list(
    zip(pairs, want, strict=True)
  )


def test_math_finds_the_answer():
  texts = ["It is 5, no: 72.", "#### 72", "<think>\\boxed{72}</think> It is 71", "no idea", "$72"]
  samples = [one(t, answer="#### 72", sample=i) for i, t in enumerate(texts)]
  assert kinds("math", samples) == [None, None, "wrong", "no final answer", None]
  boxed = kinds("math", samples, box_only=True)
  assert boxed == ["no final answer"] * 5


def test_math_names_a_key_that_cannot_be_parsed():
  keys = ["", r"\frac{", "???", None, ["4"], 4, 4.0]
  whys = judge("math", [one(answer=key, sample=i) for i, key in enumerate(keys)])
  assert [isinstance(why, Unjudgeable) for why in whys] == [True] * 5 + [False] * 2
  assert whys[5:] == [None, None] and "key cannot be parsed" in whys[1]


def test_math_outlives_what_sympy_does_not():
  bombs = [r"\boxed{9^{9^{9^{9}}}+1}", r"\boxed{\binom{10^9}{5\cdot 10^8}}", r"\boxed{4}"]
  whys = kinds("math", [one(t, answer="4", sample=i) for i, t in enumerate(bombs)], seconds=1.0)
  assert whys[2] is None and all(whys[:2])
  slow = one(r"\boxed{10^{10^{7}}!}", answer="4")
  assert kinds("math", [slow], seconds=0.5)[0] in ("timeout", "crashed", "wrong")


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ("0.5", r"\frac{1}{2}"),
    ("1,000", "1000.0"),
    (r"336^\circ", "336"),
    (r"\text{ B}", "b"),
    (r"\$18", "18"),
    (r"1\,000", "1{,}000"),
    ("-3/6", r"-\frac12"),
    ("2/0", "2/0"),
    ("10%", r"10\%"),
  ],
)
def test_canonical_answers(a, b):
  assert answers.canonical(a) == answers.canonical(b)
  assert answers.canonical(a) != answers.canonical("7")


def test_boxes_nest_and_the_last_whole_one_counts():
  assert answers.boxed(r"\boxed{1} \boxed{\frac{a}{\{b\}}} \boxed{cut") == r"\frac{a}{\{b\}}"
  assert answers.boxed("none") is None


def test_exact():
  samples = [one(t, answer="New York") for t in ("new  york.", "York", "I think:\nNew York")]
  assert kinds("exact", samples) == [None, "wrong", "wrong"]
  assert kinds("exact", samples, of="last line") == [None, "wrong", None]
  assert kinds("exact", [one("it is 7", answer="x #### 7")], of="final") == [None]
  assert isinstance(judge("exact", [one(answer=" ")])[0], Unjudgeable)


def test_regex():
  samples = [one("Answer: 4\nok"), one("4"), one("Answer: 4\nAs an AI")]
  whys = kinds("regex", samples, must=("^Answer: \\d+$",), must_not=("as an ai", "AI"))
  assert whys == [None, "lacks ^Answer", "has AI"]
  with pytest.raises(InputError, match="no regular expression"):
    judge("regex", [], must=("(",))


# Form


def test_format():
  texts = {
    "<think>a</think>b": None,
    "a</think>b": None,
    "<think>a</think><think>b</think>c": "several reasoning blocks",
    "<think>a": "reasoning without end",
    "b": "no reasoning",
    "x<think>a</think>b": "reasoning does not come first",
    "<think> </think>b": "empty reasoning",
    "<think>a</think> ": "no answer after the reasoning",
    "<think>so we 所以我们 compute</think>4": "mixed language",
    "<think>α + β = 𝑥, naïve</think>4": None,
  }
  assert dict(zip(texts, kinds("format", [one(t) for t in texts]), strict=True)) == texts
  assert kinds("format", [one("a</think>b")], opened="text") == ["reasoning without beginning"]
  twice = kinds("format", [one("<think>a</think>b")], opened="prompt")
  assert twice == ["reasoning opened twice"]
  assert kinds("format", [one("所以")], close="", scripts=()) == [None]


def test_length():
  samples = [one("ab"), one("abc" * 9), one("abcd", reason="length"), one(" ")]
  assert kinds("length", samples, max_chars=9) == [None, "too long", "cut off", "too short"]
  assert kinds("length", [one()], min_tokens=4) == ["too short"]
  assert isinstance(judge("length", [one(tokens=None)], max_tokens=4)[0], Unjudgeable)


def test_repetition():
  words = [f"w{i}" for i in range(100)]
  samples = [one(" ".join(words)), one("a b c d e " * 20), one("x\n" * 9), one(reason="repetition")]
  want = [None, "repeated words", "repeated lines", "stopped for repetition"]
  assert kinds("repetition", samples) == want
  assert repetition.repeated(words[:10] + words[50:60] + words[:10], 10) == pytest.approx(1 / 3)
  assert repetition.repeated([], 10) == repetition.repeated(["a"], 10) == 0


def test_perplexity():
  samples = [one(logprob_mean=x) for x in (-np.log(4), -np.log(20), 0.0, -1e9)]
  want = [None, "perplexity too high", "perplexity too low", "perplexity too high"]
  assert kinds("perplexity", samples, at_least=1.5, at_most=10.0) == want
  for value in (None, float("nan"), 0.5, True):
    assert isinstance(judge("perplexity", [one(logprob_mean=value)])[0], Unjudgeable)


# Sets


def group(number, texts, of=None, **fields):
  of = of or len(texts)
  return [one(t, id=number, sample=i, of=of, **fields) for i, t in enumerate(texts)]


def test_votes():
  samples = group(0, [r"\boxed{0.5}", "1/2", r"\boxed{\frac{1}{2}}", "it is 3", "nothing"])
  samples += group(1, ["1", "2"]) + group(2, ["no", "no"]) + group(3, ["8"], of=4)
  made = registry.load("filters", "votes").Filter()
  out = list(made.select(samples))
  want = [None] * 3 + ["outvoted", "no answer to vote with"] + ["tie"] * 2
  want += ["no answer to vote with"] * 2 + [None]
  assert [kind(why) for _, why in out] == want
  assert [s["agreement"] for s, why in out if not why] == [0.6, 0.6, 0.6, 0.25]
  once = kinds("votes", samples, one=True, at_least=0.5)
  assert once[:3] == [None, "another was chosen", "another was chosen"]
  assert once[-1] == "too little agreement"
  assert kinds("votes", group(0, ["Yes.", "yes", "no"]), of="text") == [None, None, "outvoted"]


def test_pass_rate():
  samples = group(0, ["a"] * 4) + group(1, ["a"], of=4) + group(2, ["a", "a"], of=4)
  whys = kinds("pass_rate", samples, at_least=0.5, at_most=0.9)
  assert whys == ["too easy"] * 4 + ["too hard"] + [None] * 2


def test_pseudo_label():
  said = [("Positive.", np.log(0.95), 0.5), ("negative", np.log(0.5), 1.0), ("good", 0.0, 1.0)]
  samples = [one(t, logprob=p, agreement=a) for t, p, a in said]
  labels = ("positive", "negative")
  made = registry.load("filters", "pseudo_label").Filter(labels=labels)
  out = list(made.select(samples))
  assert [kind(why) for _, why in out] == [None, "unsure", "no label"]
  assert out[0][0]["label"] == "positive" and out[0][0]["confidence"] == pytest.approx(0.95)
  assert kinds("pseudo_label", samples, labels=labels, by="agreement")[:2] == ["unsure", None]
  assert isinstance(
    judge("pseudo_label", [one("positive", logprob=None)], labels=labels)[0], Unjudgeable
  )


def test_minhash_estimates_the_jaccard_similarity():
  rng = random.Random(0)
  errors = []
  for share in np.linspace(0.1, 0.95, 18):
    common = [rng.randbytes(8) for _ in range(int(400 * share))]
    a, b = (set(common + [rng.randbytes(8) for _ in range(400 - len(common))]) for _ in "ab")
    exact = len(a & b) / len(a | b)
    got = np.mean(near_duplicates.signature(a) == near_duplicates.signature(b))
    errors.append((got - exact) / np.sqrt(exact * (1 - exact) / near_duplicates.PERMUTATIONS))
  assert np.abs(errors).max() < 4 and abs(np.mean(errors)) < 1 and np.std(errors) > 0.3


def test_near_duplicates():
  rng = random.Random(1)
  words = [f"w{rng.randrange(5000)}" for _ in range(300)]
  nearly = words[:150] + ["other"] + words[151:]
  fresh = [f"v{rng.randrange(5000)}" for _ in range(300)]
  half = words[:150] + fresh[:150]
  texts = [" ".join(w) for w in (words, nearly, fresh, half, words)] + ["", "", "!"]
  whys = kinds("near_duplicates", group(0, texts))
  near = "near-duplicate"
  assert whys == [None, near, None, None, near, None, near, None]
  other = [
    one("x", id=i, sample=s, prompt=p)
    for i, s, p in ((0, 0, texts[0]), (0, 1, texts[0]), (1, 0, texts[1]))
  ]
  assert kinds("near_duplicates", other, of="prompt") == [None, None, near]


def test_decontaminate(tmp_path, capsys):
  question = [f"q{i}" for i in range(20)]
  rows = [{"question": " ".join(question), "answer": "4"}, {"question": "one " * 9}]
  path = tmp_path / "gsm8k.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  inside = "So, " + ", ".join(question[3:16]).upper() + "!"
  texts = [inside, " ".join(question[3:15]) + " q16 q17", "fine", "One, " * 9]
  samples = [one(t) for t in texts] + [one(prompt=[{"role": "user", "content": inside}])]
  whys = judge("decontaminate", samples, against=(str(path),))
  assert [kind(w) for w in whys] == ["in gsm8k", None, None, "in gsm8k", "in gsm8k"]
  assert " ".join(question[3:16]) in whys[0] and "line 1" in whys[0]
  assert "1 of 3 texts have fewer than 8 words" in capsys.readouterr().err
  assert kinds("decontaminate", samples, against=(str(path),), prompt=False)[4] is None
  for fields, match in (({"fields": ("x",)}, "no field 'x'"), ({"ngram": 7}, "everywhere")):
    with pytest.raises(InputError, match=match):
      judge("decontaminate", samples, against=(str(path),), **fields)


# Programs

TEST = "def check(f):\n  assert f(2) == 4\n  assert f(3) == 9"
LIMITS = {"cpu_seconds": 1, "wall_seconds": 60.0, "memory": 2**29}
EVIL = Path("/tmp/distill-jax-test-evil")
# Is the secret anywhere in the program's interpreter? Are files of other processes to be had?
LOOK = """import gc, os, sys
  held, frame = [], sys._getframe()
  while frame:
    held += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
  for o in gc.get_objects():
    held += o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()
  secret = lambda o: isinstance(o, str) and len(o) == 32 and set(o) <= set("0123456789abcdef")
  return x * x * any(map(secret, held))"""
GRAB = """import ctypes, os
  call, got = ctypes.CDLL(None).syscall, []
  for pid in {1, os.getppid()}:
    other = call(434, pid, 0)
    got += [call(438, other, fd, 0) for fd in range(16)]
  return x * x * (max(got) >= 0)"""  # pidfd_open, pidfd_getfd
PROGRAMS = {  # what f does: why it is rejected
  "return x * x": None,
  "return x + 2": "failed the test",
  "while True: pass": "timeout",
  "return len(bytearray(8 << 30))": "raised",
  "import sys; sys.exit(0)": "ended before the check was done",
  "import os; os._exit(0)": "ended before the check was done",
  "print('ok', 'passed', 1.0); return 0": "failed the test",
  "import socket; socket.create_connection(('127.0.0.1', PORT), 2); return x * x": "raised",
  f"open({str(EVIL)!r}, 'w').write('x'); return x * x": "raised",
  f"import os; os.remove({__file__!r}); return x * x": "raised",
  "open('a', 'w').write('x'); return x * x * len(open('a').read())": None,
  "open('a', 'w').write('x' * (1 << 26)); return x * x": "raised",
  "import os\n  while os.fork() or True: pass": "raised",
  "import os; os.fork() or (os.setsid(), __import__('time').sleep(60)); return x * x": None,
  "import os; os.kill(-1, 9); return x * x": "raised",
  "import os; return x * x + len(os.listdir('/proc'))": None,
  "return f(x)": "raised",
  "import ctypes; ctypes.string_at(0)": "killed",
  "import os; [os.write(fd, b'x' * 40000) for fd in range(3, 9)]; return 0": "raised",
  "return type('E', (int,), {'__eq__': lambda *a: True})(0)": "failed the test",
  "return object()": "returned no plain value",
  "import socket; socket.socket(socket.AF_UNIX).connect('SOCKET'); return x * x": "raised",
  "open('/dev/zero', 'rb').read(1); return x * x": "raised",
  "open('/dev/null', 'w').write('x'); return x * x": None,
  "assert __import__('ctypes').CDLL(None).shmget(1, 1 << 20, 0o1666) >= 0": "failed the test",
  LOOK: "failed the test",
  GRAB: "failed the test",
}


def namespaces():
  return subprocess.run(["unshare", "-n", "-r", "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
  not (sys.platform == "linux" and namespaces()), reason="this machine permits no namespaces"
)


@pytest.fixture(scope="module")
def port():
  """Of a server here, which answers outside the sandbox."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    number = server.getsockname()[1]
    socket.create_connection(("127.0.0.1", number), 2).close()
    yield number


@pytest.fixture
def socket_file():
  """A socket that anybody may speak to."""
  with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
    Path(folder).chmod(0o755)
    path = Path(folder) / "s"
    listening.bind(str(path))
    path.chmod(0o777)
    listening.listen()
    yield str(path)


@needs_namespaces
def test_programs_do_no_harm(port, socket_file):
  samples = [
    one(
      "def f(x):\n  " + body.replace("PORT", str(port)).replace("SOCKET", socket_file),
      prompt="",
      test=TEST,
      entry_point="f",
      sample=i,
    )
    for i, body in enumerate(PROGRAMS)
  ]
  got = dict(zip(PROGRAMS, kinds("code", samples, **LIMITS), strict=True))
  assert got == PROGRAMS
  assert not EVIL.exists() and Path(__file__).exists()
  asleep = code.Filter(wall_seconds=1.0).run("__import__('time').sleep(600)", TEST, "f")
  assert asleep == "timeout: 1.0 s of the clock"
  mine = [p for p in Path("/proc").glob("[0-9]*/stat") if _parent(p) == os.getpid()]
  assert not [p for p in mine if b"_jail" in (p.parent / "cmdline").read_bytes()]


def _parent(stat):
  try:
    return int(stat.read_text().rpartition(")")[2].split()[1])
  except FileNotFoundError:
    return -1


@needs_namespaces
def test_programs_as_models_write_them():
  begin = "from typing import List\n\n\ndef f(x: int) -> int:\n  '''Squares.'''\n"
  good = "def f(x: List) -> int:\n  return x * x"
  texts = {
    "  return x * x": None,
    f"<think>def f(x): no</think>Here:\n```python\n{good}\n```\nIt squares.": None,
    f"```python\n{good}\n```\nUse it:\n```python\nprint(f(2))\n```": None,
    "```\ndef g(x): return 1\n```": "failed the test",
    "  return x *": "not Python",
    "  return (": "not Python",
    "  return x * x\ndef check(f): pass\nraise SystemExit": "ended before the check was done",
    "  pass\nimport builtins\nbuiltins.exec = lambda *a: None\n": "failed the test",
    "  '''": "not Python",
  }
  samples = [one(t, prompt=begin, test=TEST, entry_point="f") for t in texts]
  whys = kinds("code", samples, **LIMITS)
  assert dict(zip(texts, whys, strict=True)) == texts
  both = begin + '  return x * x\n\n\ndef g(x):\n  "Of f."\n'
  uses = "def check(g):\n  assert [g(x) for x in (1, 3)] == [f(f(x)) for x in (1, 3)]"
  sample = one("  return f(f(x))", prompt=both, entry_point="g", test=uses)
  assert kinds("code", [sample], **LIMITS) == [None]  # what the prompt defines, a test may use
  chat = one(
    f"```python\n{good.replace('List', 'int')}\n```",
    test=TEST,
    entry_point="f",
    prompt=[{"role": "user", "content": "Square."}],
  )
  assert kinds("code", [chat], **LIMITS) == [None]
  for broken in ({"test": "def ("}, {"entry_point": "f("}, {"entry_point": None}):
    fields = {"test": TEST, "entry_point": "f"} | broken
    assert isinstance(judge("code", [one(prompt="", **fields)], **LIMITS)[0], Unjudgeable)


@needs_namespaces
def test_the_sandbox_of_a_user_who_is_not_root(tmp_path):
  """In a user namespace, as `unshare -r` gives, root is nobody special."""
  bodies = [
    "return x * x",
    f"open({str(tmp_path / 'x')!r}, 'w'); return x * x",
    "import os; os.kill(-1, 9); return x * x",
  ]
  code = (
    "import sys; from distill_jax.filters.code import Filter\n"
    f"for body in {bodies!r}:\n"
    f"  print(Filter(wall_seconds=5.0).run('def f(x): ' + body, {TEST!r}, 'f'))"
  )
  done = subprocess.run(
    ["unshare", "-r", sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parents[2],
  )
  assert done.stdout.split("\n")[:3] == ["None", "raised: OSError", "raised: ProcessLookupError"], (
    done.stderr
  )
  assert not (tmp_path / "x").exists()


def test_a_machine_without_namespaces_is_refused(tmp_path, monkeypatch):
  jail = tmp_path / "jail.py"
  denied = "raise OSError(1, 'unshare: Operation not permitted')"
  jail.write_text(code.JAIL.read_text().replace('  call("unshare", flags)', f"  {denied}"))
  monkeypatch.setattr(code, "JAIL", jail)
  sample = one("def f(x): return x * x", prompt="", test=TEST, entry_point="f")
  with pytest.raises(InputError, match="sandbox cannot be made here .*isolated=False"):
    judge("code", [sample])
  assert kinds("code", [sample], isolated=False) == [None]


# The verb


def write(path, rows):
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))


def raw(number, texts, **fields):
  return [
    {k: v for k, v in sample.items() if k != "of"} for sample in group(number, texts, **fields)
  ]


def verb(tmp_path, rows, on_bad="stop", **filters):
  tmp_path.mkdir(exist_ok=True)
  write(tmp_path / "samples.jsonl", rows)
  c = config.base()
  c.filter.on_bad = on_bad
  c.filter.order = tuple(filters)
  for name, made in filters.items():
    c.filters[name] = made
  resolved = config.resolve(c)
  assert config.from_dict(json.loads(json.dumps(config.to_dict(resolved)))) == resolved
  return filter_samples(resolved, tmp_path)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_filters_run_in_order_and_lose_nothing(tmp_path):
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
  kept, rejected = lines(tmp_path / "kept.jsonl"), lines(tmp_path / "rejected.jsonl")
  assert [(r["id"], r["sample"], r["agreement"]) for r in kept] == [(0, 0, 0.5)]
  by = {
    "short": {"too long": 1},
    "right": {"wrong": 3},
    "rate": {"too easy": 3},
    "vote": {"another was chosen": 1},
  }
  assert result == {"samples": 9, "kept": 1, "rejected": 8, "rejected_by": by}
  assert {
    k: v for k, v in json.loads((tmp_path / "filter.json").read_text()).items() if k != "of"
  } == result
  counted = Counter((r["rejected"]["by"], r["rejected"]["why"]) for r in rejected)
  assert counted == {(f, w): n for f, whys in by.items() for w, n in whys.items()}
  bare = lambda r: json.dumps({k: r[k] for k in rows[0]}, sort_keys=True)
  assert Counter(map(bare, kept + rejected)) == Counter(map(bare, rows))
  assert not list(tmp_path.glob(".*part"))
  before = (tmp_path / "kept.jsonl").read_bytes(), (tmp_path / "rejected.jsonl").read_bytes()
  assert filter_again(tmp_path, rows) == result
  assert before == (
    (tmp_path / "kept.jsonl").read_bytes(),
    (tmp_path / "rejected.jsonl").read_bytes(),
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
def test_every_filter_loses_nothing_whatever_it_is_given(name, tmp_path):
  rng = random.Random(name)
  pieces = ["4", "\\boxed{", "}", "<think>", "</think>", "所以", "\ud800", "\n", "####", " ", "yes"]
  rows: list = []
  for number in range(20):
    for i in range(rng.randrange(1, 4)):
      row = one("".join(rng.choices(pieces, k=rng.randrange(12))), id=number, sample=i)
      row["about"] = {"answer": rng.choice(["4", "", None, "\\frac{"])}
      for field in ("tokens", "logprob_mean", "reason", "prompt"):
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
  out = lines(tmp_path / "kept.jsonl") + lines(tmp_path / "rejected.jsonl")
  assert result["samples"] == len(out) == len(rows) - 1
  assert result["rejected_by"]["read"] == {"no sample": 1, "not JSON": 1}
  good = [r for r in rows if isinstance(r, dict)]
  bare = lambda r: json.dumps({k: r[k] for k in good[0]}, sort_keys=True)
  assert Counter(map(bare, good)) == Counter(bare(r) for r in out if "line" not in r)
  with pytest.raises(InputError, match=r"samples.jsonl, (line|prompt) \d+.*: .*filter.on_bad=skip"):
    verb(tmp_path, rows, "stop", it=made)


def test_a_bad_key_stops_or_is_counted(tmp_path):
  rows = raw(0, ["4", "4"], answer="\\frac{") + raw(1, ["4"], answer="4")
  with pytest.raises(InputError, match="prompt 0, sample 0: .*key cannot be parsed.*frac"):
    verb(tmp_path, rows, right=config.filter("math"))
  assert not (tmp_path / "kept.jsonl").exists() and not (tmp_path / "filter.json").exists()
  result = verb(tmp_path, rows, "skip", right=config.filter("math"))
  assert result["kept"] == 1
  assert result["rejected_by"] == {"right": {"the key cannot be parsed": 2}}


def test_what_the_verb_refuses(tmp_path):
  length = config.filter("length")
  with pytest.raises(InputError, match="filters is empty"):
    verb(tmp_path, [])
  with pytest.raises(InputError, match="filter.order is .*name each once"):
    c = config.base()
    c.filters.a, c.filters.b = length, length
    filter_samples(config.resolve(c), tmp_path)
  with pytest.raises(InputError, match="not together"):
    verb(tmp_path, [*raw(0, ["a"]), *raw(1, ["a"]), *raw(0, ["b"])], it=length)
  with pytest.raises(InputError, match="on_bad is 'go'"):
    verb(tmp_path, [], "go", it=length)
  with pytest.raises(InputError, match="there is no 'lenght' in distill_jax/filters"):
    config.filter("lenght")
  with pytest.raises(InputError, match="did you mean 'max_chars'"):
    config.filter("length", max_char=3)
  (tmp_path / "samples.jsonl").unlink()
  with pytest.raises(InputError, match="is not there"):
    c = config.base()
    c.filters.it = length
    filter_samples(config.resolve(c), tmp_path)
  assert verb(tmp_path, [], it=length) == {
    "samples": 0,
    "kept": 0,
    "rejected": 0,
    "rejected_by": {},
  }


def test_every_filter_says_what_it_is():
  for name in registry.names("filters"):
    module = registry.load("filters", name)
    assert module.__doc__ and dataclasses.is_dataclass(module.Filter)
    assert issubclass(module.Filter, filters.Filter)
    assert ("select" in vars(module.Filter)) != issubclass(module.Filter, filters.SampleFilter)
    assert config.filter(name)["filter"] == name


def test_plain_values_come_through_as_they_are():
  values = [
    None,
    True,
    1,
    -(2**80),
    0.1,
    float("inf"),
    "ü\ud800",
    b"\x00",
    1j,
    [],
    (1, [2, (3,)]),
    {1, 2},
    frozenset("ab"),
    {(1, 2): {"a": None}, "dict": 1},
  ]
  for value in values:
    got = _runner.decode(json.loads(json.dumps(_runner.encode(value))))
    assert got == value and type(got) is type(value)
  assert _runner.encode([np.float64(0.5), np.arange(2), Counter("a")]) == _runner.encode(
    [0.5, [0, 1], {"a": 1}]
  )
