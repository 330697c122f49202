"""`python -m runtime.plan`: what a request will take, before anything runs: frames, tokens, graphs, memory."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runtime import buckets
from runtime.errors import InputError
from runtime.request import add_request_arguments, prepare_request

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.processor import Prompt
    from runtime.programs import Program

_GIB = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0; 1 if it does not fit the device; 2 for bad input."""
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
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `python -m convert`")
    add_request_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="tokens to answer (default 1024)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.bundle import Bundle
    from runtime.processor import Processor
    from runtime.processor_settings import ProcessorSettings
    from runtime.progress import ProgressLine
    from runtime.tokenizer import Tokenizer

    progress = ProgressLine()
    bundle = Bundle.open(args.bundle)
    settings = ProcessorSettings.from_dict(bundle.processor_settings)
    tokenizer = Tokenizer.from_folder(bundle.path) if bundle.tokenizer_path else None
    prompt = prepare_request(Processor(settings, tokenizer, decode=False), args, progress)
    for line in _describe_prompt(prompt):
        print(line)
    length = len(prompt.token_ids)
    limit = buckets.context_limit(settings.max_position_embeddings)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    first, last = buckets.context(length, limit), buckets.context(length + args.max_new_tokens, limit)

    from runtime import compile_cache
    from runtime.programs import Programs, local_platform

    compile_cache.enable()
    programs = Programs(bundle, lambda line: progress(line, 0, 0))
    used = [programs.prefill(1, programs.chunk(1, first, length), first), programs.decode(1, last)]
    counts = prompt.patch_counts(buckets.batch_patches(programs.platform, programs.plain))
    used += [programs.vision(size) for size in sorted({buckets.patches(count) for count in counts})]
    progress.close()
    print(f"platform: {local_platform()}, 1 device")
    # Moving up to a larger cache takes both for a moment.
    outgrown = [size for size in buckets.contexts(limit) if first <= size < last]
    return 0 if _describe_memory(bundle, used, outgrown[-1] / last if outgrown else 0.0) else 1


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


def _describe_memory(bundle: "Bundle", used: "Sequence[Program]", outgrown: float) -> bool:
    """Prints the graphs and the memory they need. Returns whether that fits the device.

    Args:
        outgrown: size of the largest cache that the answer outgrows, as a part of the last one; 0: none.
    """
    import jax

    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(bundle.abstract_params()))
    cache = max(_bytes(program.args[1]) for program in used if program.key.program == "decode")
    activations = max(round(cache * outgrown), *(program.memory.temporaries for program in used))
    for program in used:
        temporaries = program.memory.temporaries / _GIB
        print(f"graph {program.key.name}: {temporaries:.3f} GiB of activations")
    total = weights + cache + activations
    print(
        f"memory: {weights / _GIB:.2f} GiB weights + {cache / _GIB:.2f} GiB cache + {activations / _GIB:.2f} GiB "
        f"activations and copies = {total / _GIB:.2f} GiB"
    )
    available = device_memory()
    fits = total <= available
    print(f"device: {available / _GIB:.2f} GiB, " + ("it fits" if fits else "it does not fit"))
    return fits


def _bytes(tree: object) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_memory() -> int:
    """Bytes that the default device can hold; on CPU, the host's memory."""
    import os

    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    sys.exit(main())
