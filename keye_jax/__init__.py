"""Keye-VL-2.0 in JAX: `KeyeConfig` (config.json) and `KeyeVL` (the model, read from Hugging Face safetensors)."""

from typing import TYPE_CHECKING, Any

from keye_jax.config import KeyeConfig
from keye_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from keye_jax.model import KeyeVL

__all__ = ["CheckpointError", "ConfigError", "KeyeConfig", "KeyeVL"]


def __getattr__(name: str) -> Any:
    # The model brings jax and flax, which take a second to import; reading a configuration needs neither.
    if name == "KeyeVL":
        from keye_jax.model import KeyeVL

        return KeyeVL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
