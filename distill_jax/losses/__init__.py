"""Training losses. Each loss is one file, and the folder is the registry.

A loss is a module with a frozen dataclass `Loss` whose fields are its config keys. There are two
kinds of losses, declared in _base.py:

  TokenLoss    `token_loss(logits_BCV, batch, step) -> loss_BC`. The fused head
               (nn/fused_head.py) evaluates it on one chunk of positions at a time.
  FeatureLoss  `feature_loss(student, teacher, adapters, batch, pairs) -> Mean`. It compares the
               features that `feature_specs` names. A LayerPairLoss compares pairs of layers.

Losses can be used without a config: `losses.KD(temperature=2.0)`.
"""

from distill_jax.losses._base import BaseLoss, FeatureLoss, LayerPairLoss, TokenLoss
from distill_jax.losses._fused import count_labels, fused_loss, logits_loss
from distill_jax.losses.alm import Loss as ALM
from distill_jax.losses.ce import Loss as CE
from distill_jax.losses.embedding import Loss as Embedding
from distill_jax.losses.hidden import Loss as Hidden
from distill_jax.losses.kd import Loss as KD
from distill_jax.losses.log_ratio import Loss as LogRatio
from distill_jax.losses.mixture import Loss as Mixture
from distill_jax.losses.policy_gradient import Loss as PolicyGradient
from distill_jax.losses.pseudo_label import Loss as PseudoLabel
from distill_jax.losses.relational import Loss as Relational
from distill_jax.losses.relations import Loss as Relations
from distill_jax.losses.targets import (
  DenseTargets,
  LabelTargets,
  SampledTargets,
  SpanTargets,
  TopKTargets,
)

__all__ = [
  "ALM",
  "CE",
  "KD",
  "BaseLoss",
  "DenseTargets",
  "Embedding",
  "FeatureLoss",
  "Hidden",
  "LabelTargets",
  "LayerPairLoss",
  "LogRatio",
  "Mixture",
  "PolicyGradient",
  "PseudoLabel",
  "Relational",
  "Relations",
  "SampledTargets",
  "SpanTargets",
  "TokenLoss",
  "TopKTargets",
  "count_labels",
  "fused_loss",
  "logits_loss",
]

SHARED = ("divergences", "features", "targets")
