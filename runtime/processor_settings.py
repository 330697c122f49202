"""What the processor needs to know of a checkpoint, read from its JSON files and kept in a bundle's manifest."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.chat import ChatSettings
from runtime.errors import InputError
from runtime.template import MAX_TEMPLATE_CHARACTERS
from runtime.tokenizer import Tokenizer

MAX_JSON_BYTES = 16 << 20
_HALF = (0.5, 0.5, 0.5)
_ORIGIN = "processor settings"
# Sampling settings that are not implemented, with the value at which each changes nothing.
_NEUTRAL = {
    "frequency_penalty": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "typical_p": 1,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json; a value it leaves out is the neutral one."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class SecondResize:
    """The resize of the checkpoint's own image processor, which follows the one by the request's limits.

    Its range of areas in pixels and Pillow's number of its filter. While the range holds the first result nothing
    changes.
    """

    min_pixels: int
    max_pixels: int
    resample: int = 3


@dataclass(frozen=True)
class ProcessorSettings:
    """Plain values only: `to_dict` goes into JSON and `from_dict` takes it back."""

    image_token_id: int
    video_token_id: int
    vocab_size: int
    stop_ids: tuple[int, ...] = ()
    """Any of these ends a turn: generation_config.json, config.json, `<|im_end|>` and `<|endoftext|>` together."""
    max_position_embeddings: int = 262_144
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, ...] = _HALF
    image_std: tuple[float, ...] = _HALF
    video_mean: tuple[float, ...] = _HALF
    video_std: tuple[float, ...] = _HALF
    second_resize: SecondResize | None = None
    """None: the checkpoint states no range of its own, or this was switched off with `dataclasses.replace`."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """For a checkpoint without chat template."""
    chat_template: str | None = None
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token and pad_token, which templates may write."""
    generation: GenerationDefaults | None = None
    """None: the checkpoint has no generation_config.json."""
    warnings: tuple[str, ...] = ()
    """What the checkpoint asks for and does not get."""

    def __post_init__(self) -> None:
        values = vars(self)
        _whole(values, "vocab_size", _ORIGIN, 1, 2**31)
        for name in ("image_token_id", "video_token_id"):
            _whole(values, name, _ORIGIN, 0, self.vocab_size - 1)
        for index in self.stop_ids:
            _whole({"stop_ids": index}, "stop_ids", _ORIGIN, 0, self.vocab_size - 1)
        _whole(values, "max_position_embeddings", _ORIGIN, 1, 2**31)
        _whole(values, "patch_size", _ORIGIN, 1, 1024)
        _whole(values, "merge_size", _ORIGIN, 1, 16)
        for name in ("image_mean", "image_std", "video_mean", "video_std"):
            _channels(values, name)
        for name, text in (("chat_template", self.chat_template), ("default_system", self.chat.default_system)):
            if text is not None and not isinstance(text, str):
                raise InputError(f"{_ORIGIN}: {name} is {text!r:.40}; it must be a string")

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "ProcessorSettings":
        """Read a checkpoint folder; every file but config.json may be missing.

        Raises InputError naming the file and the value that is missing, malformed or contradicts another file.
        """
        folder = Path(path)
        config = _read_json(folder / "config.json")
        if config is None:
            raise InputError(f"{folder} has no config.json; give the folder of a Keye-VL-2.0 checkpoint")
        generation = _read_json(folder / "generation_config.json")
        tokenizer_config = _read_json(folder / "tokenizer_config.json") or {}
        image = _read_json(folder / "preprocessor_config.json") or {}
        video = _read_json(folder / "video_preprocessor_config.json") or {}
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        vision = config.get("vision_config", {})
        if not isinstance(vision, dict):
            raise InputError("config.json: vision_config is not an object; copy the file again")
        vocab_size = _whole(config, "vocab_size", "config.json", 1, 2**31)
        settings = cls(
            image_token_id=_whole(config, "image_token_id", "config.json", 0, vocab_size - 1),
            video_token_id=_whole(config, "video_token_id", "config.json", 0, vocab_size - 1),
            vocab_size=vocab_size,
            stop_ids=_stop_ids(config, generation or {}, tokenizer, vocab_size),
            max_position_embeddings=_whole(config, "max_position_embeddings", "config.json", 1, 2**31, default=262_144),
            patch_size=_whole(vision, "patch_size", "config.json vision_config", 1, 1024, default=14),
            merge_size=_whole(vision, "spatial_merge_size", "config.json vision_config", 1, 16, default=2),
            image_mean=_channels(image, "image_mean"),
            image_std=_channels(image, "image_std"),
            video_mean=_channels(image | video, "image_mean"),
            video_std=_channels(image | video, "image_std"),
            second_resize=_second_resize(image),
            chat_template=_chat_template(folder, tokenizer_config),
            template_tokens=_template_tokens(tokenizer_config),
            generation=None if generation is None else _generation(generation),
            warnings=_unsupported(generation or {}),
        )
        _check_preprocessor(image, settings)
        if tokenizer is not None:
            check_tokenizer(settings, tokenizer)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProcessorSettings":
        """Take back what `to_dict` gave and JSON stored. Raises InputError for anything else."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise InputError(f"the bundle's processor settings have the unknown key {unknown[0]!r}; convert it again")
        try:
            made: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            made["chat"] = ChatSettings(**values["chat"])
            for name, kind in (("second_resize", SecondResize), ("generation", GenerationDefaults)):
                made[name] = None if values[name] is None else kind(**values[name])
            return cls(**made)
        except (KeyError, TypeError) as error:
            raise InputError(f"the bundle's processor settings are damaged ({error}); convert it again") from error


def check_tokenizer(settings: ProcessorSettings, tokenizer: Tokenizer) -> None:
    """Raise InputError unless the tokenizer's pad tokens have the ids that the model reads."""
    for name, key in (("<|image_pad|>", "image_token_id"), ("<|video_pad|>", "video_token_id")):
        ours, theirs = getattr(settings, key), tokenizer.control_ids.get(name)
        if theirs != ours:
            has = f"gives {name!r} the id {theirs}" if theirs is not None else f"has no {name!r}"
            raise InputError(
                f"tokenizer.json {has} but config.json says {key} {ours}: the files are of different models"
            )
    if tokenizer.vocab_size > settings.vocab_size:
        raise InputError(
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1} but config.json says vocab_size "
            f"{settings.vocab_size}: the files are of different models"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise InputError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} it may have")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _whole(values: Mapping[str, Any], key: str, file: str, low: int, high: int, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{file}: {key} is {value!r:.40}; it must be a whole number from {low} to {high}")
    return value


def _real(values: Mapping[str, Any], key: str, file: str, low: float, high: float, default: float) -> float:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{file}: {key} is {value!r:.40}; it must be a number from {low:g} to {high:g}")
    return float(value)


def _channels(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    given = values.get(key, _HALF)
    numbers = isinstance(given, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in given)
    if not numbers or len(given) != 3 or (key.endswith("_std") and min(given) <= 0):
        raise InputError(f"preprocessor_config.json: {key} is {given!r:.60}; it must be three numbers, a std above 0")
    return tuple(map(float, given))


def _stop_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    found: set[int] = set()
    for file, values in (("generation_config.json", generation), ("config.json", config)):
        given = values.get("eos_token_id")
        for index in given if isinstance(given, list) else [] if given is None else [given]:
            found.add(_whole({"eos_token_id": index}, "eos_token_id", file, 0, vocab_size - 1))
    if tokenizer is not None:
        names = ("<|im_end|>", "<|endoftext|>")
        found |= {tokenizer.control_ids[name] for name in names if name in tokenizer.control_ids}
    return tuple(sorted(found))


def _second_resize(image: Mapping[str, Any]) -> SecondResize | None:
    file = "preprocessor_config.json"
    size = image.get("size")
    size = size if isinstance(size, dict) else {}
    low = image.get("min_pixels", size.get("min_pixels"))
    high = image.get("max_pixels", size.get("max_pixels"))
    if image.get("do_resize") is False or low is None or high is None:
        return None
    limits = {"min_pixels": low, "max_pixels": high}
    high = _whole(limits, "max_pixels", file, 1, 2**40)
    low = _whole(limits, "min_pixels", file, 1, high)
    return SecondResize(low, high, _whole(image, "resample", file, 0, 5, default=3))


def _check_preprocessor(image: Mapping[str, Any], settings: ProcessorSettings) -> None:
    """Refuse a file that asks for another computation than ours."""
    expected = {
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "patch_size": settings.patch_size,
        "merge_size": settings.merge_size,
    }
    for key, value in expected.items():
        if image.get(key, value) != value:
            raise InputError(f"preprocessor_config.json: {key} is {image[key]!r:.40}, but only {value} is supported")
    factor = image.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise InputError(f"preprocessor_config.json: rescale_factor is {factor!r:.40}, but only 1/255 is supported")


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template from the first of the three places that has one; of several named ones, "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        if file.stat().st_size > MAX_TEMPLATE_CHARACTERS:
            raise InputError(f"{file} is larger than the {MAX_TEMPLATE_CHARACTERS} bytes a chat template may have")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text ({error}); copy it again") from error
    found = (_read_json(folder / "chat_template.json") or tokenizer_config).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InputError(f"{folder}: chat_template is a {type(found).__name__}; it must be a string")
    return found


def _template_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = tokenizer_config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _generation(values: Mapping[str, Any]) -> GenerationDefaults:
    file = "generation_config.json"
    sample = values.get("do_sample", False)
    if not isinstance(sample, bool):
        raise InputError(f"{file}: do_sample is {sample!r:.40}; it must be true or false")
    return GenerationDefaults(
        do_sample=sample,
        temperature=_real(values, "temperature", file, 0, 100, 1.0),
        top_p=_real(values, "top_p", file, 1e-6, 1, 1.0),
        top_k=int(_real(values, "top_k", file, 0, 2**31 - 1, 0)),
    )


def _unsupported(generation: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"generation_config.json asks for {key} = {generation[key]!r:.40}, which is not supported and not applied"
        for key, neutral in _NEUTRAL.items()
        if generation.get(key) not in (None, neutral)
    )
