"""One loss a file; the folder is the registry.

A loss is a module with a frozen dataclass `Loss` whose fields are its config keys. It is of one
of two kinds, which _base.py declares:

  TokenLoss    `token_loss(logits_BCV, batch, step) -> loss_BC`, a chunk at a time on the fused
               head (nn/fused_head.py).
  FeatureLoss  `feature_loss(student, teacher, adapters, batch, pairs) -> Mean`, of features
               that `feature_specs` names. A LayerPairLoss is one over pairs of layers.

As a library: `losses.KD(temperature=2.0)`.
"""

from distill_jax.losses._base import BaseLoss, FeatureLoss, LayerPairLoss, TokenLoss
from distill_jax.losses.ce import Loss as CE
from distill_jax.losses.embedding import Loss as Embedding
from distill_jax.losses.hidden import Loss as Hidden
from distill_jax.losses.kd import Loss as KD
from distill_jax.losses.mixture import Loss as Mixture
from distill_jax.losses.pseudo_label import Loss as PseudoLabel
from distill_jax.losses.relational import Loss as Relational
from distill_jax.losses.relations import Loss as Relations
from distill_jax.losses.supports import DenseTargets, SampledTargets, TopKTargets

__all__ = [
  "CE",
  "KD",
  "BaseLoss",
  "DenseTargets",
  "Embedding",
  "FeatureLoss",
  "Hidden",
  "LayerPairLoss",
  "Mixture",
  "PseudoLabel",
  "Relational",
  "Relations",
  "SampledTargets",
  "TokenLoss",
  "TopKTargets",
]

SHARED = ("divergences", "features", "supports")
