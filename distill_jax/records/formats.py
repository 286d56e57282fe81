"""Records in the formats of trainers: shifted labels, positions, segments and top-k arrays.

The functions use numpy. grain, Tunix and jax are imported only to make a dataset for them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_jax.data import model_rows
from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.records import fields
from distill_jax.records.fields import IDS, LOGP, SMOOTHING, WEIGHT, Record
from distill_jax.records.manifest import Manifest
from distill_jax.runtime import extras

if TYPE_CHECKING:
  import grain

  from distill_jax.records.store import Store

FORMATS = ("plain", "maxtext", "tunix", "batch")
UNUSED = -1e4  # logit of unused entries; its exponential is 0


def example(record: Record, m: Manifest) -> Record:
  """Returns a record as a training example.

  Returns:
    For packed text, arrays [T]: inputs, inputs_position, inputs_segmentation, targets,
    targets_position, targets_segmentation (int32) and mask (bool). `targets[t]` is the token after
    `inputs[t]`; positions begin at 0 in each segment; segments are numbered from 1, and 0 is
    padding. `mask` is True where the target is trained on, and targets_segmentation is 0 elsewhere.
    For a task, labels and mask.

    The teacher's arrays are added as teacher_ids, teacher_weight or teacher_logp [T, K], and
    teacher_argmax, teacher_entropy and teacher_label_logp [T], as the store holds them; those of
    a text that a student wrote as behaviour_logp and reward [T].
  """
  if m.labels:
    out = {"labels": record["labels_T"], "mask": record["mask_T"]}
  else:
    tokens_T, segments_T, mask_T = (record[name] for name in fields.TEXT)
    positions_T = model_rows.positions(segments_T)
    out = {
      "inputs": tokens_T,
      "inputs_position": positions_T,
      "inputs_segmentation": segments_T,
      "targets": model_rows.next_tokens(tokens_T),
      "targets_position": positions_T,
      "targets_segmentation": np.where(mask_T, segments_T, 0),
      "mask": mask_T,
    }
  if SMOOTHING in record:
    out["smoothing"] = record[SMOOTHING]
  out |= {f.name: record[f.read] for f in fields.ROLLOUT if f.read in record}
  stored = (*fields.PREDICTED, *fields.TAPPED)
  return out | {f"teacher_{f.name}": record[f.read] for f in stored if f.read in record}


def top_k(record: Record) -> tuple[np.ndarray, np.ndarray]:
  """Returns a record's entries as top-k arrays: distinct ids, int32 [T, K], and float32 logits.

  The logits are log-probabilities for "topk" and "dense" records, and logarithms of the weights for
  "sampled" ones. Unused entries have the logit -1e4 and ids that do not occur at the position, so
  that the arrays can be scattered into a row of the vocabulary.
  """
  ids_TK = record[IDS.read]
  if WEIGHT.read in record:
    with np.errstate(divide="ignore"):
      logits_TK = np.log(record[WEIGHT.read])
  else:
    logits_TK = record[LOGP.read]
  used_TK = logits_TK > -np.inf
  T, K = ids_TK.shape
  # At least K of the first 2 K ids are free. In a smaller vocabulary fewer are, but always enough
  # for the K - M unused entries of a position with M used ones.
  taken = np.zeros((T, 2 * K), bool)
  t_TK = np.broadcast_to(np.arange(T)[:, None], (T, K))
  low_TK = used_TK & (ids_TK < 2 * K)
  taken[t_TK[low_TK], ids_TK[low_TK]] = True
  free_TK = np.argsort(taken, axis=1, kind="stable")[:, :K]
  place_TK = np.maximum(
    np.cumsum(~used_TK, axis=1) - 1, 0
  )  # index of each unused entry among the unused ones
  filled_TK = np.take_along_axis(free_TK, place_TK, 1)
  ids_TK = np.where(used_TK, ids_TK, filled_TK).astype(np.int32)
  return ids_TK, np.where(used_TK, logits_TK, UNUSED).astype(np.float32)


def maxtext(record: Record, m: Manifest) -> Record:
  """Returns a record with the keys of MaxText's trainers.

  Returns:
    inputs, inputs_position, inputs_segmentation, targets, targets_position, targets_segmentation,
    int32 [T]; for stores with targets also top_k_indices int32 and top_k_logits float32 [T, K].
  """
  whole = example(record, m)
  names = [f"{side}{part}" for side in ("inputs", "targets") for part in ("", "_position")]
  names += ["inputs_segmentation", "targets_segmentation"]
  out = {name: whole[name] for name in names}
  if IDS.read in record:
    out["top_k_indices"], out["top_k_logits"] = top_k(record)
  return out


def tunix_fields(record: Record, m: Manifest) -> dict[str, Any]:
  """Returns the fields of a TunixInput, by name; see `tunix_input_class`."""
  whole = maxtext(record, m)
  mask_T = np.zeros_like(record["mask_T"])
  mask_T[1:] = record["mask_T"][:-1]  # Tunix masks tokens, not the positions before them
  out: dict[str, Any] = {
    "input_tokens": whole["inputs"],
    "input_mask": mask_T,
    "positions": whole["inputs_position"],
    "segment_ids": whole["inputs_segmentation"],
  }
  teacher = {name: whole[name] for name in ("top_k_indices", "top_k_logits") if name in whole}
  return out | ({"teacher_output": teacher} if teacher else {})


@functools.cache
def tunix_input_class() -> Any:
  """Returns the dataclass of Tunix batches, a subclass of its distillation TrainingInput.

  The fields of Tunix are input_tokens, input_mask (True at tokens that are trained on) and
  teacher_output, a dict of top_k_indices and top_k_logits. The subclass adds positions and
  segment_ids, because rows are packed.
  """
  try:
    trainer = importlib.import_module("tunix.distillation.distillation_trainer")
  except ImportError as e:
    raise InputError(
      f'as_dataset(format="tunix") needs Tunix ({e}). Run `pip install google-tunix`.'
    ) from e

  struct = importlib.import_module("flax.struct")
  fields_of_ours = {"positions": None, "segment_ids": None}
  namespace = {"__annotations__": dict.fromkeys(fields_of_ours, Any), **fields_of_ours}
  return struct.dataclass(type("TunixInput", (trainer.TrainingInput,), namespace), frozen=True)


def as_dataset(
  store: Store, form: str, batch_size: int | None, seed: int | None, epochs: int | None
) -> grain.MapDataset:
  """Returns a store as a grain dataset; see `Store.as_dataset`."""
  check_choice("format", form, FORMATS, "Correct it")
  m = store.manifest
  if m.labels and form != "plain":
    raise bad_value("format", form, "'plain' for a store of a task", "Use it")
  if form in ("tunix", "batch") and batch_size is None:
    raise bad_value("batch_size", None, f"a number for format={form!r}", "Pass it")
  if form == "tunix":
    tunix_input_class()  # refused here and not at the first batch
  with extras.needed("train"):
    import grain

  indices = grain.MapDataset.range(len(store))
  if seed is not None:
    indices = indices.shuffle(seed=seed)
  if epochs != 1:
    indices = indices.repeat(epochs)
  if batch_size is None:
    return indices.map(functools.partial(_read, store=store, form=form))
  if not 1 <= batch_size <= len(indices):
    expected = f"from 1 to {len(indices)}, the number of examples"
    raise bad_value(
      "batch_size", batch_size, expected, "Lower it" if batch_size > 0 else "Raise it"
    )
  batches = indices.batch(batch_size, drop_remainder=True, batch_fn=list)
  return batches.map(functools.partial(_read_batch, store=store, form=form))


def _read(index: int, store: Store, form: str) -> dict[str, Any]:
  """Returns the example of an index."""
  return _convert(store[index], form, store.manifest)


def _read_batch(indices: Sequence[int], store: Store, form: str) -> Any:
  """Returns the batch of some indices, whose records are read at once."""
  records, m = store.read_many(indices), store.manifest
  if form == "batch":
    from distill_jax.records import collate

    return collate.collate(records, recorded=collate.recorded_of(m))
  batch = _stack([_convert(record, form, m) for record in records])
  return tunix_input_class()(**batch) if form == "tunix" else batch


def _convert(record: Record, form: str, m: Manifest) -> dict[str, Any]:
  return {"plain": example, "maxtext": maxtext, "tunix": tunix_fields}[form](record, m)


def _stack(rows: Sequence[Any]) -> Any:
  """Returns dicts of arrays, which may be nested, as one dict of stacked arrays."""
  if isinstance(rows[0], dict):
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}
  return np.stack(rows)
