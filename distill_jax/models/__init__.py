"""One model family a file; the folder is the registry.

Where to begin: `_decoder.py` is the decoder that Llama, Qwen, Gemma and DeepSeek share, one layer
and the model around the layers; `llama.py` shows what a family adds to it. Encoders share
`_encoder.py` (bert.py, vit.py), encoder-decoders `_seq2seq.py` (t5.py; marian.py and whisper.py
through `_bart.py`). Layers, attention and the declaration of parameters are in distill_jax/nn.

A family is a module with

  HF_MODEL_TYPES   the `model_type`s of config.json that it reads
  Config           a FamilyConfig: the shape of a model, read from config.json and written to it
  Model            a types.Model, made by `Model(config, key)`; called with (inputs, compute,
                   taps), it gives a types.Output
  TINY, CONFIGS    a shape for tests, and published shapes by name

and, where a checkpoint needs them, PREFIX and AFTER (hub/prefixed.py).
"""

from distill_jax.models._decoder import Block as DecoderBlock
from distill_jax.models._decoder import Cache as DecoderCache
from distill_jax.models._decoder import Model as DecoderModel
from distill_jax.models._decoder_config import Config as DecoderConfig
from distill_jax.models._experts import Experts
from distill_jax.models._seq2seq import Cache as Seq2SeqCache
from distill_jax.models._seq2seq import Model as Seq2SeqModel
from distill_jax.models._windows import GLOBAL, LOCAL
from distill_jax.types import FamilyConfig

__all__ = [
  "GLOBAL",
  "LOCAL",
  "DecoderBlock",
  "DecoderCache",
  "DecoderConfig",
  "DecoderModel",
  "Experts",
  "FamilyConfig",
  "Seq2SeqCache",
  "Seq2SeqModel",
]

SHARED = ("trainables", "loading", "runs", "standalone")
