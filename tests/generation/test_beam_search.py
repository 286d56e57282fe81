"""Greedy and beam search of encoder-decoders give the tokens of transformers."""

import jax
import numpy as np
import parity
import pytest
import seq2seq_pairs
import slow

from distill_jax.errors import InputError
from distill_jax.generation.beam_search import Search, search
from distill_jax.nn import layers

torch, transformers = parity.torch, parity.transformers
EOS, PAD, START, NEW = 1, 0, 2, 8
run = jax.jit(search, static_argnames=("compute", "spec"))


@pytest.fixture(scope="module", params=slow.all_but(("t5", "whisper"), seq2seq_pairs.CASES))
def both(request, tmp_path_factory):
  """Returns the case, transformers' model, its folder, and our model."""
  return seq2seq_pairs.open_pair(request.param, tmp_path_factory.mktemp("theirs"))


def transformers_tokens(model, given, spec: Search) -> np.ndarray:
  """Returns transformers' tokens after the prompt, int [B, max_new_tokens], padded."""
  B = len(next(iter(given.values())))
  config = transformers.GenerationConfig(
    num_beams=spec.beams,
    do_sample=False,
    max_new_tokens=spec.max_new_tokens,
    min_length=0,
    use_cache=False,  # the cache of transformers 5 for T5 has the encoder's number of layers
    length_penalty=spec.length_penalty,
    early_stopping=False,
    eos_token_id=EOS,
    pad_token_id=PAD,
    decoder_start_token_id=START,
    suppress_tokens=list(spec.suppress) or None,
    begin_suppress_tokens=list(spec.suppress_first) or None,
  )
  prompt = torch.tensor([list(spec.prompt)] * B)
  model.generation_config = config
  tokens = transformers.GenerationMixin.generate(
    model, **given, decoder_input_ids=prompt, generation_config=config
  )
  tokens = tokens.numpy()[:, len(spec.prompt) :]
  tokens = np.pad(tokens, ((0, 0), (0, spec.max_new_tokens - tokens.shape[1])), constant_values=PAD)
  ended = np.cumsum(tokens == EOS, 1) - (tokens == EOS) > 0
  return np.where(ended, PAD, tokens)  # transformers pads with eos if the pad token is 0


CASES = {
  "greedy": {"beams": 1},
  "beams": {"beams": 4, "length_penalty": 0.6},
  "forced": {"beams": 3, "prompt": (START, 9, 11), "suppress": (5, 20), "suppress_first": (EOS, 7)},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_those_of_transformers(both, case):
  kind, theirs, _, ours = both
  inputs, given, _, _ = seq2seq_pairs.examples(kind)
  given = {k: v for k, v in given.items() if k != "decoder_input_ids"}
  spec = Search(
    **{"prompt": (START,), "eos": EOS, "pad": PAD, "max_new_tokens": NEW, **CASES[case]}
  )
  tokens, score = run(ours, inputs.source, compute=layers.ComputeConfig(), spec=spec)
  np.testing.assert_array_equal(tokens, transformers_tokens(theirs, given, spec))
  assert np.isfinite(score).all() and (np.asarray(score) < 0).all()


def test_a_row_does_not_depend_on_other_rows(both):
  kind, _, _, ours = both
  source = seq2seq_pairs.examples(kind)[0].source
  for beams in (1, 4):
    spec = Search((START,), EOS, PAD, NEW, beams)
    together, score = run(ours, source, compute=layers.ComputeConfig(), spec=spec)
    turned = jax.tree.map(lambda x: x[::-1], source)
    again, score_again = run(ours, turned, compute=layers.ComputeConfig(), spec=spec)
    np.testing.assert_array_equal(together, again[::-1])
    np.testing.assert_array_equal(score, score_again[::-1])


def test_a_search_without_beams_or_prompt_is_an_error():
  for fields, message in (
    ({"beams": 0}, "beams is 0; expected a positive integer"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a positive integer"),
    ({"prompt": ()}, r"prompt is \(\); expected at least one token"),
  ):
    with pytest.raises(InputError, match=message):
      Search(**{"prompt": (1,), "eos": 1, "pad": 0, "max_new_tokens": 4, **fields})
