"""`python -m runtime.export`: traces a bundle's programs into graphs for a platform, on any host."""

import argparse
import sys
from collections.abc import Sequence

from runtime.aot import split_topology
from runtime.errors import InputError
from runtime.graphs import ANY_CHIP, PRESETS, SINGLE, GraphKey
from runtime.remote import is_address

_EXAMPLES = """examples:
  python -m runtime.export BUNDLE --platform cpu
  python -m runtime.export BUNDLE --platform cuda --context 32768
  python -m runtime.export BUNDLE --platform cuda --plain
  python -m runtime.export BUNDLE --platform tpu --topology v5e:2x4

No accelerator is needed: a laptop makes the graphs of a TPU pod. Exported graphs are code; a bundle runs only
those that its manifest lists.
"""

_MAX_BATCH, _MAX_DEVICES = 4096, 65536


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 for input that cannot be served."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted; the graphs named so far are in the bundle", file=sys.stderr)
        return 130
    except InputError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.export",
        description="Exports a bundle's programs (vision, prefill, decode) for a platform and stores them in it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `python -m convert`; the graphs go into it")
    parser.add_argument("--platform", required=True, choices=("cuda", "tpu", "cpu"))
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--topology", metavar="NAME", help="TPU chips to shard over, such as v5e:2x4")
    target.add_argument("--devices", type=int, metavar="N", help="devices to shard over (default 1)")
    parser.add_argument("--preset", choices=PRESETS, help=f"what is spread over several devices (default {PRESETS[0]})")
    parser.add_argument("--plain", action="store_true", help="without GPU kernels, which need Hopper (H100, H200)")
    parser.add_argument("--context", type=int, metavar="N", help="contexts up to N tokens (default: the model's)")
    parser.add_argument("--chunk", type=int, metavar="N", help="prefill chunks of N tokens (default: by platform)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences side by side (default 1)")
    parser.add_argument("--explain", action="store_true", help="also the programs of `runtime.generate --explain`")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime import buckets
    from runtime.bundle import Bundle
    from runtime.processor_settings import ProcessorSettings
    from runtime.progress import ProgressLine

    if args.topology is not None and args.platform != "tpu":
        raise InputError(f"--topology names TPU chips; use --devices for --platform {args.platform}")
    if args.plain and args.platform != "cuda":
        raise InputError(f"--plain leaves GPU kernels out; graphs for --platform {args.platform} have none")
    if is_address(args.bundle):
        raise InputError(f"{args.bundle} is an address; export into the bundle's folder and copy that there again")
    bundle = Bundle.open(args.bundle)
    settings = ProcessorSettings.from_dict(bundle.processor_settings)
    longest = buckets.contexts(buckets.context_limit(settings.max_position_embeddings))[-1]
    for name, most in {"context": longest, "chunk": longest, "batch": _MAX_BATCH, "devices": _MAX_DEVICES}.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise InputError(f"--{name} {value} must be from 1 to {most} for this model")
    chip, devices = (None, args.devices or 1) if args.topology is None else split_topology(args.topology)
    limit = longest if args.context is None else buckets.context(args.context, longest, devices)

    from runtime.trace import Tracer

    if args.preset and devices == 1:
        raise InputError(f"--preset {args.preset} says what several devices share; give --devices or --topology")
    preset = args.preset or PRESETS[0] if devices > 1 else SINGLE
    standard = (args.chunk,) if args.chunk else buckets.chunks(args.platform, args.plain)
    progress = ProgressLine()
    tracer = Tracer.of(bundle)
    keys = [
        GraphKey(program, args.platform, devices, shape, args.plain, preset)
        for program, shape in buckets.all_shapes(
            limit, standard, batch=args.batch, devices=devices, explain=args.explain
        )
    ]
    for number, key in enumerate(keys):
        progress(f"exporting {key.name}", number, len(keys))
        exported = tracer.export(key, chip and chip.abstract_device())
        try:
            entry = bundle.add_graph(key, exported, device_kind=chip.kind if chip else ANY_CHIP)
        except OSError as error:
            raise InputError(
                f"{bundle.path} cannot be written ({error.strerror}); make it writable, or copy it and export there"
            ) from None
        progress.close()
        kernels = ", ".join(entry.kernels) or "no custom kernels"
        print(f"{key.name}: {entry.bytes:,} bytes, {kernels}")
    print(f"{len(keys)} graphs for {devices} x {args.platform} in {bundle.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
