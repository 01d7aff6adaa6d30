"""Models as pure functions: `load` reads a directory; encoders, decoders, vision."""

from flexhinm_jax.models.load import Model, load

__all__ = ["Model", "load"]
