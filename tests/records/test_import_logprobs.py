"""Tests of the import of server dumps, with fixtures in the documented formats of the servers."""

import json

import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.records import import_logprobs, store

pytestmark = pytest.mark.smoke

WORDS = {"The": 1, " cat": 2, " sat": 3, " dog": 4, "!": 5, " on": 6}

# "The cat sat": three candidates for the second token, the third's own token ranked fourth.
VLLM = {
  "id": "cmpl-1",
  "object": "text_completion",
  "model": "m",
  "choices": [
    {
      "index": 0,
      "text": "",
      "finish_reason": "length",
      "prompt_token_ids": [1, 2, 3],
      "prompt_logprobs": [
        None,
        {
          "2": {"logprob": -0.5, "rank": 1, "decoded_token": " cat"},
          "4": {"logprob": -1.5, "rank": 2, "decoded_token": " dog"},
          "6": {"logprob": -3.0, "rank": 3, "decoded_token": " on"},
        },
        {
          "3": {"logprob": -6.0, "rank": 4, "decoded_token": " sat"},
          "6": {"logprob": -0.3, "rank": 1, "decoded_token": " on"},
        },
      ],
    }
  ],
}
SGLANG = {
  "text": " sat",
  "meta_info": {
    "input_token_logprobs": [[None, 1, None], [-0.5, 2, None]],
    "input_top_logprobs": [None, [[-0.5, 2, None], [-1.5, 4, None], [-3.0, 6, None]]],
    "output_token_logprobs": [[-6.0, 3, None]],
    "output_top_logprobs": [[[-0.3, 6, None]]],
    "finish_reason": {"type": "length"},
  },
}


def openai(**change):
  top = lambda *pairs: [{"token": t, "logprob": x, "bytes": list(t.encode())} for t, x in pairs]
  return {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "prompt_token_ids": [1],
    "choices": [
      {
        "index": 0,
        "message": {"role": "assistant", "content": " cat sat"},
        "logprobs": {
          "content": [
            {
              "token": " cat",
              "logprob": -0.5,
              "bytes": None,
              "top_logprobs": top((" cat", -0.5), (" dog", -1.5), (" on", -3.0)),
            },
            {"token": " sat", "logprob": -6.0, "bytes": None, "top_logprobs": top((" on", -0.3))},
          ]
        },
      }
    ],
    **change,
  }


def read(tmp_path, lines, fmt, n=3, seq_len=8, missing_mass="tail_bucket", **compute):
  path = tmp_path / "dump.jsonl"
  path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
  return list(
    import_logprobs.sequences(
      path, fmt, n=n, seq_len=seq_len, vocab_size=10, missing_mass=missing_mass, **compute
    )
  )


@pytest.mark.parametrize(
  ("fmt", "line"), [("vllm", VLLM), ("sglang", SGLANG), ("openai", openai())]
)
def test_all_formats_give_the_same_records(tmp_path, fmt, line):
  (seq,) = read(tmp_path, [line], fmt, token_id=WORDS.get)
  assert list(seq["tokens_T"]) == [1, 2, 3, 0, 0, 0, 0, 0]
  assert list(seq["segments_T"]) == [1, 1, 1, 0, 0, 0, 0, 0]
  assert list(seq["mask_T"]) == [True, True] + [False] * 6
  assert list(seq["ids_TN"][0]) == [2, 4, 6]
  np.testing.assert_allclose(seq["logp_TN"][0], [-0.5, -1.5, -3.0])
  assert list(seq["ids_TN"][1, :2]) == [6, 3]
  np.testing.assert_allclose(seq["logp_TN"][1], [-0.3, -6.0, -np.inf])
  np.testing.assert_allclose(seq["label_logp_T"][:3], [-0.5, -6.0, 0])
  assert list(seq["argmax_T"][:2]) == [2, 6]


def test_a_dump_is_written_to_a_store(tmp_path):
  rows = read(tmp_path, [VLLM] * 5, "vllm")
  assert [r["segments_T"].max() for r in rows] == [2, 2, 1]
  m = store.Manifest(
    kind="topk",
    n=3,
    vocab_size=10,
    seq_len=8,
    teacher={"name": "far"},
    tokenizer="t",
    corpus="c",
    sequences_per_shard=2,
    extents=(3,),
    entropy=False,
    missing_mass="tail_bucket",
  )
  with store.Writer(tmp_path / "s", m) as w:
    for r in w.missing():
      w.write_shard(r, (rows[i] for i in r))
    w.complete()
  got = store.open_store(tmp_path / "s")[0]
  assert list(got["tokens_T"]) == [1, 2, 3, 1, 2, 3, 0, 0]
  np.testing.assert_allclose(got["logp_TK"][4], [-6.0, -0.3, -np.inf], atol=1e-3)
  assert "entropy_T" not in got


def test_differing_k_missing_positions_and_token_id_strings(tmp_path):
  (seq,) = read(tmp_path, [VLLM], "vllm", n=1)
  assert list(seq["ids_TN"][:2, 0]) == [2, 6]
  assert seq["label_logp_T"][1] == -6.0  # though the label is not among the entries
  line = openai()
  line["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = []
  for entry in line["choices"][0]["logprobs"]["content"]:
    for x in [entry, *entry["top_logprobs"]]:
      x["token"] = f"token_id:{WORDS[x['token']]}"
  (seq,) = read(tmp_path, [line], "openai")
  assert list(seq["mask_T"][:3]) == [False, True, False]


def test_a_candidate_of_several_tokens_counts_towards_the_tail_or_is_refused(tmp_path):
  words = {k: v for k, v in WORDS.items() if k != " dog"}
  (seq,) = read(tmp_path, [openai()], "openai", token_id=words.get)
  assert list(seq["ids_TN"][0, :2]) == [2, 6]
  with pytest.raises(InputError, match="line 1 has ' dog', which is not a single token"):
    read(tmp_path, [openai()], "openai", token_id=words.get, missing_mass="renormalise")
  words.pop(" cat")
  with pytest.raises(InputError, match="line 1 has ' cat', which is not a single token"):
    read(tmp_path, [openai()], "openai", token_id=words.get)


@pytest.mark.parametrize(
  ("fmt", "lines", "words"),
  [
    ("vllm", [VLLM, "{"], "line 2 is not JSON"),
    ("vllm", [SGLANG], "line 1 is not a vllm response"),
    ("sglang", [VLLM], "line 1 is not a sglang response"),
    ("openai", [openai()], "as strings"),
    ("openai", [{"choices": []}], "prompt_token_ids"),
    ("vllm", [], "is empty"),
    ("other", [VLLM], "one of"),
    (
      "vllm",
      [{"prompt_token_ids": [1, 99], "prompt_logprobs": [None, {"99": -1}]}],
      "token id 99, but the vocabulary",
    ),
    ("vllm", [{"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"2": 3.0}]}], "3.0"),
    ("vllm", [{"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"2": 0, "3": 0}]}], "2.000"),
    ("vllm", [{"prompt_token_ids": [1, 2], "prompt_logprobs": [None]}], "1 prompt_logprobs"),
    ("vllm", [{"prompt_token_ids": [1] * 9, "prompt_logprobs": [None] * 9}], "9 tokens"),
  ],
)
def test_bad_dumps(tmp_path, fmt, lines, words):
  with pytest.raises(InputError, match=words):
    read(tmp_path, lines, fmt)
