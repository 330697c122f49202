"""Model configuration: three small frozen dataclasses that mirror the published config.json.

`KeyeConfig.from_hf` is strict: every key is either read, checked against the one value this model has, or on a list
of keys that inference does not use. Anything else is a `ConfigError`, because a key that is silently dropped is a
model that silently answers wrong.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keye_jax import config_keys as keys
from keye_jax.errors import ConfigError

IndexerDtype = Literal["fp8", "bf16", "float32"]
INDEXER_DTYPES: tuple[IndexerDtype, ...] = ("fp8", "bf16", "float32")

_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class TextConfig:
    """The decoder. Field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Rotary frequencies that follow the time, row and column position; they sum to head_dim / 2."""
    mrope_interleaved: bool = False
    """False: frequencies in three blocks (t, h, w). True: interleaved t h w t h w ... as in Qwen3-VL."""
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262144

    def __post_init__(self) -> None:
        _require_positive(self, "config.json")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; check config.json"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}; "
                "check config.json"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"mrope_section {list(self.mrope_section)} must sum to half of head_dim={self.head_dim}; "
                "check rope_scaling in config.json"
            )


@dataclass(frozen=True)
class SparseConfig:
    """DeepSeek sparse attention (`sa_config`): the lightning indexer and how many keys it selects."""

    indexer_num_heads: int
    indexer_head_dim: int
    topk: int
    mrope_interleaved: bool | None = None
    """Overrides the decoder's rotary layout for the indexer; None: the same layout."""
    indexer_dtype: IndexerDtype = "fp8"
    """Number format of index queries and keys when they are multiplied; part of the model's numerics."""

    def __post_init__(self) -> None:
        _require_positive(self, "sa_config")
        if self.indexer_head_dim & (self.indexer_head_dim - 1):
            raise ConfigError(
                f"sa_config.indexer_head_dim={self.indexer_head_dim} must be a power of two (Hadamard transform)"
            )
        if self.indexer_dtype not in INDEXER_DTYPES:
            raise ConfigError(f"indexer_dtype {self.indexer_dtype!r} is not one of {', '.join(INDEXER_DTYPES)}")


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP-like vision tower at native resolution."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int = 14
    num_channels: int = 3
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _require_positive(self, "vision_config")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ConfigError(
                f"vision_config: hidden_size={self.hidden_size} over num_attention_heads="
                f"{self.num_attention_heads} must give a head width that is a multiple of 4 (2-D rotary embedding)"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vision_config: image_size={self.image_size} is smaller than patch_size={self.patch_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def table_side(self) -> int:
        """Side of the square table of learned positions (27 in the published model)."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2

    @property
    def merged_dim(self) -> int:
        """Width of the projector's input: one merged block of patches."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclass(frozen=True)
class KeyeConfig:
    """Everything the weights' shapes and the forward pass depend on."""

    text: TextConfig
    sparse: SparseConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    def __post_init__(self) -> None:
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < self.text.vocab_size:
                raise ConfigError(
                    f"config.json: {name}={getattr(self, name)} is no token of vocab_size={self.text.vocab_size}"
                )
        if self.image_token_id == self.video_token_id:
            raise ConfigError(f"config.json: image_token_id and video_token_id are both {self.image_token_id}")

    @classmethod
    def from_hf(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, indexer_dtype: IndexerDtype | None = None
    ) -> "KeyeConfig":
        """Reads an official config.json.

        Args:
            source: the folder or file, or its parsed content.
            indexer_dtype: number format of the lightning indexer; None keeps the default, "fp8".

        Raises:
            ConfigError: unreadable file; unknown, missing or unsupported key (named in the message).
        """
        raw = dict(source) if isinstance(source, Mapping) else read_config_json(source)
        _check_fixed(raw, keys.FIXED_TOP, "config.json")
        _check_known(raw, keys.TOP_KEYS, "config.json")
        rope = _rope_scaling(raw)
        text = TextConfig(
            **_take(raw, keys.TEXT_INTS, "config.json", int),
            **_take_optional(raw, {"rms_norm_eps": float, "norm_topk_prob": bool}, "config.json"),
            **_take_optional(raw, {"max_position_embeddings": int}, "config.json"),
            head_dim=_head_dim(raw),
            rope_theta=_rope_theta(raw),
            mrope_section=_mrope_section(rope),
            mrope_interleaved=_typed(rope.get("mrope_interleaved", False), bool, "rope_scaling.mrope_interleaved"),
        )
        config = cls(
            text=text,
            sparse=_sparse_config(raw, indexer_dtype),
            vision=_vision_config(raw),
            **_take(raw, ("image_token_id", "video_token_id"), "config.json", int),
        )
        indexer_sections(config)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`: an official config.json with the keys that inference reads."""
        text = dataclasses.asdict(self.text)
        section, interleaved = text.pop("mrope_section"), text.pop("mrope_interleaved")
        sparse = {k: v for k, v in dataclasses.asdict(self.sparse).items() if v is not None}
        sparse.pop("indexer_dtype")
        rope = {"type": "default", "mrope_section": list(section), "mrope_interleaved": interleaved}
        return {
            "architectures": [keys.ARCHITECTURE],
            "model_type": keys.MODEL_TYPE,
            **text,
            "rope_scaling": rope,
            "sa_config": sparse,
            "vision_config": dataclasses.asdict(self.vision),
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
        }


def indexer_sections(config: KeyeConfig) -> tuple[int, int, int]:
    """The decoder's `mrope_section` scaled to the indexer's head width ([16, 24, 24] at 128 → [8, 12, 12] at 64)."""
    dim, full = config.sparse.indexer_head_dim, config.text.head_dim
    if any(s * dim % full for s in config.text.mrope_section):
        raise ConfigError(
            f"mrope_section {list(config.text.mrope_section)} does not scale from head_dim={full} "
            f"to indexer_head_dim={dim} in whole numbers; check rope_scaling and sa_config"
        )
    t, h, w = (s * dim // full for s in config.text.mrope_section)
    return t, h, w


def read_config_json(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Parses config.json (the file, or the folder that holds it); size-capped. Raises ConfigError."""
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MiB; that is not a config.json")
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the folder that holds config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a JSON object; fetch the file again")
    return raw


def _sparse_config(raw: Mapping[str, Any], indexer_dtype: IndexerDtype | None) -> SparseConfig:
    sparse = _section(raw, "sa_config")
    _check_fixed(sparse, keys.FIXED_SPARSE, "sa_config")
    _check_known(sparse, keys.SPARSE_KEYS, "sa_config")
    return SparseConfig(
        **_take(sparse, keys.SPARSE_INTS, "sa_config", int),
        **_take_optional(sparse, {"mrope_interleaved": bool}, "sa_config"),
        indexer_dtype=indexer_dtype or "fp8",
    )


def _vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    vision = _section(raw, "vision_config")
    _check_fixed(vision, keys.FIXED_VISION, "vision_config")
    _check_known(vision, keys.VISION_KEYS, "vision_config")
    return VisionConfig(
        **_take(vision, keys.VISION_INTS, "vision_config", int),
        **_take_optional(vision, keys.VISION_OPTIONAL, "vision_config"),
    )


def _rope_scaling(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling`, or `rope_parameters` as newer transformers write it."""
    if raw.get("rope_scaling") is not None:
        name = "rope_scaling"
    elif raw.get("rope_parameters") is not None:
        name = "rope_parameters"
    else:
        raise ConfigError("config.json has no rope_scaling with mrope_section; the rotary layout is not guessed")
    rope = _section(raw, name)
    _check_known(rope, keys.ROPE_KEYS, name)
    kinds = {"type": ("default", "mrope"), "rope_type": ("default", "mrope")}
    _check_fixed(rope, kinds, name)
    return rope


def _mrope_section(rope: Mapping[str, Any]) -> tuple[int, int, int]:
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or not all(type(s) is int and s > 0 for s in section):
        raise ConfigError(f"rope_scaling.mrope_section must be three positive integers, not {section!r}")
    return section[0], section[1], section[2]


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """Looks in every place that published files use; a missing or contradicting value is an error, never a guess."""
    places = {"rope_theta": raw.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(name), Mapping):
            places[f"{name}.rope_theta"] = raw[name].get("rope_theta")
    found = {k: _typed(v, float, k) for k, v in places.items() if v is not None}
    if not found:
        raise ConfigError("config.json has no rope_theta (top level, rope_scaling or rope_parameters); add it")
    if len(set(found.values())) > 1:
        raise ConfigError(f"config.json contradicts itself about rope_theta: {found}")
    theta = next(iter(found.values()))
    if theta <= 1:
        raise ConfigError(f"rope_theta={theta} must be larger than 1")
    return theta


def _head_dim(raw: Mapping[str, Any]) -> int:
    if raw.get("head_dim") is not None:
        return _typed(raw["head_dim"], int, "config.json: head_dim")
    raise ConfigError("config.json has no head_dim; add it (128 in the published model)")


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json has no object {name!r}; is this a Keye-VL-2.0 checkpoint?")
    return section


def _check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    if where == "config.json":
        architectures = raw.get("architectures") or [keys.ARCHITECTURE]
        if "model_type" not in raw or architectures != [keys.ARCHITECTURE]:
            raise ConfigError(
                f"config.json describes model_type={raw.get('model_type')!r}, architectures={architectures!r}; "
                f"this library runs {keys.MODEL_TYPE} / {keys.ARCHITECTURE} only"
            )
    for key, allowed in fixed.items():
        if key in raw and raw[key] not in allowed:
            raise ConfigError(
                f"{where}: {key}={raw[key]!r} is not supported (supported: {' or '.join(repr(a) for a in allowed)})"
            )


def _check_known(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown[:5]))}; remove it if it does not change the model"
        )


def _take(raw: Mapping[str, Any], names: tuple[str, ...], where: str, kind: type) -> dict[str, Any]:
    missing = [key for key in names if raw.get(key) is None]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; fetch the file again")
    return {key: _typed(raw[key], kind, f"{where}: {key}") for key in names}


def _take_optional(raw: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    return {k: _typed(raw[k], kind, f"{where}: {k}") for k, kind in kinds.items() if raw.get(k) is not None}


def _typed(value: Any, kind: type, what: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{what} must be {kind.__name__}, not {value!r}")
    return value


_MAX_SIZE = 1 << 24  # no dimension of any model comes near; keeps shape arithmetic on hostile files bounded


def _require_positive(config: TextConfig | SparseConfig | VisionConfig, where: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is int and not 0 < value <= _MAX_SIZE:
            raise ConfigError(f"{where}: {field.name}={value} must be between 1 and {_MAX_SIZE}")
        if type(value) is float and not 0 < value < math.inf:
            raise ConfigError(f"{where}: {field.name}={value} must be a positive number")
