"""Exported graphs: what one is called, what the manifest says about it, and the checks before one is loaded.

A graph is a serialised `jax.export`: StableHLO with static shapes, weights as arguments. Its bytes are code. Only
graphs that the manifest lists, with the size and sha256 it gives, are ever deserialised.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError

if TYPE_CHECKING:
    from jax.export import Exported

FOLDER = "graphs"
PLATFORMS = ("cpu", "cuda", "tpu")
SHAPE_NAMES: Mapping[str, tuple[str, ...]] = {
    # On each device.
    "vision": ("patches",),
    "prefill": ("batch", "chunk", "context"),
    "decode": ("batch", "context"),
    "explain": ("batch", "chunk", "context"),
}
ANY_CHIP = "any"
SINGLE = "single"
PRESETS = ("context", "expert")
"""How a model may lie on several devices (`keye_jax.sharding`); the first is the default."""
DONATED: Mapping[str, tuple[int, ...]] = {"vision": (), "prefill": (1, 2), "decode": (1, 2), "explain": (1,)}
"""Arguments whose memory the result takes over: the cache and the logits."""

OLDEST_JAX, NEWEST_JAX = (0, 10), (0, 13)
"""Graphs made by a JAX from the first up to, not including, the second are loaded; the range this package supports."""

_CUSTOM_CALL = re.compile(r"custom_call @([\w.$]+)")
# Markers for the partitioner, which no kernel stands behind.
_NOT_KERNELS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
_MAX_GRAPH_BYTES = 1 << 30
_MAX_EXTENT = 1 << 30
_VERSION = re.compile(r"(\d+)\.(\d+)\.\d+")
_FILE = re.compile(r"graphs/[a-z0-9-]+\.stablehlo")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class GraphKey:
    """Which graph: a program for a platform, a number of devices and static shapes."""

    program: str
    platform: str
    devices: int
    shape: tuple[int, ...]
    """In the order of SHAPE_NAMES[program]."""
    plain: bool = False
    """Without the platform's kernels: for chips that they do not run on."""
    preset: str = SINGLE
    """How the model lies on several devices; a name of PRESETS, SINGLE for one device."""

    def __post_init__(self) -> None:
        if self.preset != SINGLE if self.devices == 1 else self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r:.40} for {self.devices} devices")

    @property
    def name(self) -> str:
        """Such as prefill-cpu-d1-batch1-chunk64-context512."""
        sizes = (f"{n}{s}" for n, s in zip(SHAPE_NAMES[self.program], self.shape, strict=True))
        plain = ["plain"] if self.plain else []
        preset = [self.preset] if self.devices > 1 else []
        return "-".join([self.program, self.platform, *plain, f"d{self.devices}", *preset, *sizes])

    def export_command(self, bundle: object) -> str:
        """The command line that makes this graph, and others that go with it."""
        named = dict(zip(SHAPE_NAMES[self.program], self.shape, strict=True))
        options = [f"--{name} {named[name]}" for name in ("context", "chunk", "batch") if name in named]
        if self.program == "explain":
            options[1] = "--explain"
        devices = [f"--devices {self.devices}", f"--preset {self.preset}"] if self.devices > 1 else []
        plain = ["--plain"] if self.plain else []
        bundle = shlex.quote(str(bundle))
        return " ".join(["python -m runtime.export", bundle, f"--platform {self.platform}", *plain, *devices, *options])


@dataclass(frozen=True)
class GraphEntry:
    """One graph in the manifest."""

    key: GraphKey
    file: str
    bytes: int
    sha256: str
    jax_version: str
    calling_convention_version: int
    created: str
    """ISO 8601, UTC."""
    device_kind: str
    """What JAX calls the chip that its kernels have the sizes of; ANY_CHIP where nothing in it depends on one."""
    mesh: Mapping[str, int]
    """Mesh axis → devices."""
    kernels: Mapping[str, bool]
    """Custom call → whether jax.export guarantees it stable."""

    def suits(self, chip: str) -> bool:
        """Whether it may run on a chip. With the sizes of another one it may not fit its memory."""
        return self.device_kind in (ANY_CHIP, chip)

    def to_json(self) -> dict[str, Any]:
        flat = asdict(self)
        key = flat.pop("key")
        named = dict(zip(SHAPE_NAMES[self.key.program], self.key.shape, strict=True))
        return {**key, "shape": named, **flat}

    @classmethod
    def from_json(cls, raw: Any) -> "GraphEntry":
        """Raises InputError for anything but what `to_json` writes."""
        try:
            return cls._parse(_object(raw))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"manifest.json of the bundle is damaged: it describes a graph wrongly ({error!r:.200}); "
                "copy the whole bundle again or convert again"
            ) from None

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> "GraphEntry":
        program, platform, devices, named = (raw.pop(name) for name in ("program", "platform", "devices", "shape"))
        plain, preset = raw.pop("plain"), raw.pop("preset")
        if program not in SHAPE_NAMES or platform not in PLATFORMS:
            raise ValueError(f"program {program!r:.40} on platform {platform!r:.40}")
        if set(_object(named)) != set(SHAPE_NAMES[program]):
            raise ValueError(f"shape {named!r:.80}")
        shape = tuple(named[name] for name in SHAPE_NAMES[program])
        mesh, kernels = _object(raw.pop("mesh")), _object(raw.pop("kernels"))
        counts = (devices, raw["bytes"], *shape, *mesh.values())
        if any(type(n) is not int or not 0 < n <= _MAX_EXTENT for n in counts) or raw["bytes"] > _MAX_GRAPH_BYTES:
            raise ValueError(f"sizes {counts!r:.80}")
        if type(plain) is not bool:
            raise ValueError(f"plain {plain!r:.40}")
        entry = cls(key=GraphKey(program, platform, devices, shape, plain, preset), mesh=mesh, kernels=kernels, **raw)
        texts = (entry.jax_version, entry.created, entry.device_kind, *mesh, *kernels)
        if not all(isinstance(text, str) and len(text) < 200 for text in texts):
            raise ValueError("a text is none, or too long")
        if type(entry.calling_convention_version) is not int or not all(type(k) is bool for k in kernels.values()):
            raise ValueError("calling convention or kernels")
        if not _FILE.fullmatch(entry.file) or not _SHA256.fullmatch(entry.sha256):
            raise ValueError(f"file {entry.file!r:.80} or its sha256")
        return entry


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise TypeError(f"{value!r:.80} is no object")
    return dict(value)


def describe(key: GraphKey, exported: "Exported", device_kind: str) -> tuple[GraphEntry, bytes]:
    """The manifest's entry for a graph, and the bytes to store under its file name."""
    import jax

    content = bytes(exported.serialize())
    digest = hashlib.sha256(content).hexdigest()
    entry = GraphEntry(
        key=key,
        file=f"{FOLDER}/{key.name}-{digest[:8]}.stablehlo",
        bytes=len(content),
        sha256=digest,
        jax_version=jax.__version__,
        calling_convention_version=exported.calling_convention_version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device_kind=device_kind,
        mesh={"model": key.devices},
        kernels=kernels(exported),
    )
    return entry, content


def kernels(exported: "Exported") -> dict[str, bool]:
    """The custom calls in a graph, and whether jax.export guarantees that they will load later."""
    excused = [str(check) for check in exported.disabled_safety_checks]
    found = set(_CUSTOM_CALL.findall(exported.mlir_module())) - _NOT_KERNELS
    return {name: not any(name in check for check in excused) for name in sorted(found)}


def load(root: Path, entry: GraphEntry) -> "Exported":
    """Reads, checks and deserialises one graph.

    Raises:
        InputError: missing or altered file; a JAX that cannot run it. The message holds the command that mends it.
    """
    mend = f"make it again: {entry.key.export_command(root)}"
    _check_version(entry, mend)
    path = root / entry.file
    try:
        with path.open("rb") as file:
            content = file.read(entry.bytes + 1)
    except OSError as error:
        raise InputError(f"graph {path} cannot be read ({error.strerror}); {mend}") from None
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise InputError(f"graph {path} is not the file that manifest.json lists (size or sha256 differ); {mend}")

    from jax import export

    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:
        # Whatever the deserialiser says: StableHLO beyond this JAX's window, or a file that never was a graph.
        raise InputError(f"graph {path} cannot be loaded by this JAX ({error!s:.200}); {mend}") from None
    if tuple(exported.platforms) != (entry.key.platform,) or exported.nr_devices != entry.key.devices:
        raise InputError(
            f"graph {path} is for {exported.nr_devices} x {'/'.join(exported.platforms)}, "
            f"manifest.json says {entry.key.devices} x {entry.key.platform}; {mend}"
        )
    if _shape(entry.key.program, exported) != entry.key.shape:
        raise InputError(f"graph {path} takes arrays of other shapes than {entry.key.name} in manifest.json; {mend}")
    return exported


def arguments(exported: "Exported") -> tuple[Any, ...]:
    """A graph's arguments as trees of shapes and dtypes."""
    import jax

    args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    return args


def _shape(program: str, exported: "Exported") -> tuple[int, ...] | None:
    """The sizes of SHAPE_NAMES as the arguments have them; None for arguments of another program."""
    try:
        args = arguments(exported)
        if program == "vision":
            return (args[1].shape[0] // exported.nr_devices,)
        _, batch, context = args[1]["kv"].shape[:3]
        if program == "decode":
            return (batch, context) if "delta" in args[3] else None
        rows, chunk = args[2 if program == "explain" else 3]["tokens"].shape
        return (batch, chunk, context) if rows == batch else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _check_version(entry: GraphEntry, mend: str) -> None:
    import jax
    from jax import export

    found = _VERSION.match(entry.jax_version)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    fits = oldest <= entry.calling_convention_version <= newest
    if not OLDEST_JAX <= version < NEWEST_JAX or not fits:
        raise InputError(
            f"graph {entry.file} was made by JAX {entry.jax_version} (calling convention "
            f"{entry.calling_convention_version}); JAX {jax.__version__} here runs conventions {oldest} to {newest} "
            f"of JAX {'.'.join(map(str, OLDEST_JAX))} to below {'.'.join(map(str, NEWEST_JAX))}; {mend}"
        )
