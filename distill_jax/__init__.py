"""distill_jax: knowledge distillation, TPU-native."""

__version__ = "0.2.0"
