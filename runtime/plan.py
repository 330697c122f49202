"""`python -m runtime.plan`: what a request will take, before anything runs: frames, tokens, graphs, memory."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime import aot, buckets
from runtime.errors import DoesNotFit, InputError
from runtime.graphs import PRESETS, SINGLE, GraphKey
from runtime.request import add_request_arguments, prepare_request

if TYPE_CHECKING:
    from jax.export import Exported

    from runtime.bundle import Bundle
    from runtime.processor import Prompt

_GIB = 1 << 30
_EXAMPLES = """examples:
  python -m runtime.plan BUNDLE --video clip.mp4 --prompt "What happens?"
  python -m runtime.plan BUNDLE --video clip.mp4 --prompt "What happens?" --topology v5e:2x4
  python -m runtime.plan gs://bucket/bundle --token-ids 1,2,3 --devices 4 --preset expert

With --topology nothing of a TPU is needed; programs are compiled for it where libtpu is installed (keye-jax[tpu]), and
without it the plan counts weights and cache. A bundle made with `python -m convert --shapes-only` will do.
"""


@dataclass(frozen=True)
class Target:
    """What the request would run on."""

    platform: str
    devices: int
    preset: str
    plain: bool
    memory: int
    """Bytes that each device has."""
    compile: Callable[[GraphKey], aot.Memory] | None
    """Raises DoesNotFit; None: there is no compiler for it here."""
    chip: aot.Chip | None = None
    """Where it is not here."""

    def key(self, program: str, *shape: int) -> GraphKey:
        return GraphKey(program, self.platform, self.devices, shape, self.plain, self.preset)


@dataclass(frozen=True)
class Graph:
    """A program that the request runs; sizes are bytes on each device."""

    key: GraphKey
    weights: int
    """Of its own weights: the vision tower's, or the decoder's."""
    cache: int
    working: int | None
    """Inputs, results and activations beside weights and cache; None where it was not compiled."""
    remark: str
    """Why it was not compiled."""
    fits: bool
    """False where the compiler says that it does not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0; 1 if it does not fit the devices; 2 for bad input."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.plan",
        description="Says what a request to `python -m runtime.generate` will take: frames and tokens, the graphs "
        "that run, and the memory of each device. Videos are not decoded and weights are not loaded; the programs are "
        "compiled, and the compilation is kept.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="folder made by `python -m convert`, or its address (gs://, s3://)"
    )
    add_request_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="tokens to answer (default 1024)")
    several = parser.add_argument_group("several devices")
    target = several.add_mutually_exclusive_group()
    target.add_argument("--devices", type=int, metavar="N", help="spread the model over N (default: all accelerators)")
    target.add_argument("--topology", metavar="NAME", help="plan for TPU chips that are not here, such as v5e:2x4")
    several.add_argument("--preset", choices=PRESETS, help=f"what is spread (default {PRESETS[0]})")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.bundle import Bundle
    from runtime.processor import Processor
    from runtime.processor_settings import ProcessorSettings
    from runtime.progress import ProgressLine
    from runtime.tokenizer import Tokenizer

    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    topology = None if args.topology is None else aot.split_topology(args.topology)
    progress = ProgressLine()
    bundle = Bundle.open(args.bundle)
    settings = ProcessorSettings.from_dict(bundle.processor_settings)
    tokenizer = Tokenizer.from_folder(bundle.path) if bundle.tokenizer_path else None
    prompt = prepare_request(Processor(settings, tokenizer, decode=False), args, progress)
    for line in _describe_prompt(prompt):
        print(line)
    report = lambda line: progress(line, 0, 0)  # noqa: E731
    target = _here(bundle, args, report) if topology is None else _for_topology(bundle, args, *topology, report)
    contexts = _contexts(prompt, args.max_new_tokens, target.devices)
    graphs = [_measured(bundle, target, key) for key in _keys(bundle, prompt, target, contexts)]
    progress.close()
    print(f"platform: {args.topology or target.platform}, {target.devices} device{'s' if target.devices > 1 else ''}")
    return 0 if _describe_memory(bundle, graphs, target, contexts) else 1


def _describe_prompt(prompt: "Prompt") -> Iterator[str]:
    for media in prompt.media:
        count, (rows, columns) = len(media.frames), media.grid
        merge = prompt.settings.merge_size
        size = f"{media.frames.shape[2]}x{media.frames.shape[1]}, {rows * columns // merge**2} tokens"
        if media.kind == "image":
            yield f"image {media.label}: {size}"
        else:
            times = media.timestamps
            span = "" if times is None else f" from {times[0]:.1f} s to {times[-1]:.1f} s"
            yield f"video {media.label}: {count} frames{span}, each {size}"
    yield f"prompt: {len(prompt.token_ids):,} tokens"
    yield from (f"warning: {warning}" for warning in prompt.warnings)


def _here(bundle: "Bundle", args: argparse.Namespace, report: Callable[[str], None]) -> Target:
    """Devices of this machine."""
    from runtime import compile_cache
    from runtime.programs import Programs, choose_devices

    compile_cache.enable()
    devices = choose_devices(args.devices)
    programs = Programs(bundle, report, devices, args.preset)

    def compiled(key: GraphKey) -> aot.Memory:
        return getattr(programs, key.program)(*key.shape).memory

    preset = _preset(args, len(devices))
    return Target(programs.platform, len(devices), preset, programs.plain, device_memory(devices), compiled)


def _for_topology(
    bundle: "Bundle", args: argparse.Namespace, chip: aot.Chip, devices: int, report: Callable[[str], None]
) -> Target:
    """TPU chips that need not exist."""
    from importlib.util import find_spec

    def compiled(key: GraphKey) -> aot.Memory:
        report(f"compiling {key.name}")
        return aot.compile_for_topology(key, _exported(bundle, key, chip), args.topology).memory

    here = find_spec("libtpu") is not None
    if here:
        aot.without_chips()
    return Target("tpu", devices, _preset(args, devices), False, chip.memory, compiled if here else None, chip)


def _preset(args: argparse.Namespace, devices: int) -> str:
    return (args.preset or PRESETS[0]) if devices > 1 else SINGLE


def _contexts(prompt: "Prompt", max_new_tokens: int, devices: int) -> list[int]:
    """Capacities of the cache, from the one that holds the prompt to the one that holds the answer too. Raises
    InputError if both exceed the model's context."""
    length, limit = len(prompt.token_ids), buckets.context_limit(prompt.settings.max_position_embeddings)
    first, last = (buckets.context(tokens, limit, devices) for tokens in (length, length + max_new_tokens))
    return [size for size in buckets.contexts(limit, devices) if first <= size <= last]


def _keys(bundle: "Bundle", prompt: "Prompt", target: Target, contexts: Sequence[int]) -> list[GraphKey]:
    """The graphs that decide how much memory is needed: all, except decode's for contexts that the answer outgrows."""
    first, standard = contexts[0], buckets.chunks(target.platform, target.plain)
    lengths = {key.shape[1] for key in bundle.graphs if key.program == "prefill"}
    exported = [length for length in lengths if target.key("prefill", 1, length, first) in bundle.graphs]
    chunk = buckets.chunk(len(prompt.token_ids), exported, standard)
    return [
        *(target.key("vision", size) for size in _patches(prompt, target)),
        target.key("prefill", 1, chunk, first),
        target.key("decode", 1, contexts[-1]),
    ]


def _patches(prompt: "Prompt", target: Target) -> list[int]:
    """Patches on each device in the calls of the vision program, without repetition."""
    most = buckets.batch_patches(target.platform, target.plain)
    counts = prompt.patch_counts(buckets.share(sum(prompt.patch_counts(most)), target.devices, most))
    calls = (counts[start : start + target.devices] for start in range(0, len(counts), target.devices))
    return sorted({buckets.patches(max(call)) for call in calls})


def _measured(bundle: "Bundle", target: Target, key: GraphKey) -> Graph:
    compiled, remark, fits = None, "not compiled, for want of libtpu: pip install 'keye-jax[tpu]'", True
    if target.compile is not None:
        try:
            compiled = target.compile(key)
        except DoesNotFit as error:
            remark, fits = str(error), False
    sizes = aot.argument_bytes(_exported(bundle, key, target.chip))
    weights, cache = sizes[0], 0 if key.program == "vision" else sizes[1]
    return Graph(key, weights, cache, None if compiled is None else compiled.beside(weights + cache), remark, fits)


def _exported(bundle: "Bundle", key: GraphKey, chip: aot.Chip | None) -> "Exported":
    """The bundle's graph, or one made for this plan alone."""
    from runtime import graphs

    entry = bundle.graphs.get(key)
    if entry is not None and (chip is None or entry.suits(chip.kind)):
        return graphs.load(bundle.path, entry)
    from runtime.trace import Tracer

    return Tracer.of(bundle).export(key, chip and chip.abstract_device())


def _describe_memory(bundle: "Bundle", graphs: Sequence[Graph], target: Target, contexts: Sequence[int]) -> bool:
    """Prints the graphs and the memory that they need of each device. Returns whether that fits."""
    for graph in graphs:
        working = graph.remark if graph.working is None else f"{graph.working / _GIB:.3f} GiB of activations"
        print(f"graph {graph.key.name}: {working}")
    for size in contexts[:-1]:
        print(f"graph {target.key('decode', 1, size).name}: until the answer outgrows it")
    weights, cache = _all_weights(bundle, graphs), graphs[-1].cache
    # Moving up to a larger cache takes both for a moment.
    outgrown = round(cache * contexts[-2] / contexts[-1]) if len(contexts) > 1 else 0
    known = [graph.working for graph in graphs if graph.working is not None]
    activations = max([outgrown, *known])
    total = weights + cache + activations
    several = target.devices > 1
    print(
        f"memory{' of each device' if several else ''}: {weights / _GIB:.2f} GiB weights + {cache / _GIB:.2f} GiB "
        f"cache + {activations / _GIB:.2f} GiB activations and copies = {total / _GIB:.2f} GiB"
    )
    fits = total <= target.memory and all(graph.fits for graph in graphs)
    known_fit = "it fits" if len(known) == len(graphs) else "weights and cache fit, activations are not known"
    verdict = known_fit if fits else "it does not fit"
    print(f"{'each ' if several else ''}device: {target.memory / _GIB:.2f} GiB, {verdict}")
    return fits


def _all_weights(bundle: "Bundle", graphs: Sequence[Graph]) -> int:
    """Bytes of the weights on each device: those of both programs, whether or not there is anything to see."""
    import jax

    tower = [bundle.abstract_params()[name] for name in ("vision", "projector")]
    vision = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tower))
    seen = {graph.key.program: graph.weights for graph in graphs}
    return seen.get("vision", vision) + seen["decode"]


def device_memory(devices: Sequence[Any]) -> int:
    """Bytes that each of the devices can hold; on CPU, its part of the host's memory."""
    import os

    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


if __name__ == "__main__":
    sys.exit(main())
