"""`train`: trains a student from records or beside an online teacher."""

from distill_jax.training.loop import train as run

__all__ = ["run"]
