"""Model families, one file each.

To begin reading: `_decoder.py` has the layer and the model that Llama, Qwen, Gemma and DeepSeek
share; `llama.py` shows what a family adds. Encoders share `_encoder.py` (bert.py, vit.py), and
encoder-decoders share `_seq2seq.py` (t5.py; marian.py and whisper.py through `_bart.py`). Layers,
attention and declarations of parameters are in distill_jax/nn.

A family is a module with these names:

  HF_MODEL_TYPES   values of `model_type` in config.json that belong to the family
  Config           a FamilyConfig: a model's architecture, converted from and to config.json
  Model            a types.Model: `Model(config, key)` initialises it; called with (inputs,
                   compute, taps), it returns a types.Output
  TINY, CONFIGS    an architecture for tests, and published architectures by name

Some families also define PREFIX and AFTER, for checkpoints whose tensor names may lack a prefix,
and OTHER_STARTS, for those that may start in another way (hub/renamed.py); or UNREAD_TOKENS, tokens
of the tokenizer that the model does not read, whose text is then ordinary text.
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

SHARED = ("trainables", "loading", "long_context", "runs", "standalone")
