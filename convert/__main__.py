"""Command line of the conversion; see `convert.convert`."""

import argparse
import signal
import sys
import time

from runtime.progress import StatusLine


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    progress = _Progress()
    try:
        return _convert(options, progress)
    except KeyboardInterrupt:
        progress.close()
        print(
            f"interrupted; finished groups are kept in {options.bundle}.partial, the same command goes on from there",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert a Keye-VL-2.0 checkpoint in the official Hugging Face layout (config.json, "
        "safetensors, tokenizer) to a bundle for `python -m runtime.generate`. Needs no accelerator and no torch; "
        "memory stays below 4 GiB for the published model.",
        epilog="An interrupted conversion goes on where it stopped when the same command is run again. BUNDLE "
        "appears only when it is complete. Exit codes: 0 complete, 2 bad input, 130 interrupted.",
    )
    parser.add_argument("hf_dir", metavar="HF_DIR", help="folder of the checkpoint")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--indexer-dtype",
        choices=("fp8", "bf16", "float32"),
        default="fp8",
        help="in which the lightning indexer multiplies; fp8 is what the official server does (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=("none", "int8", "fp8"),
        default="none",
        help="keep the text decoder's large matrices with 8 bits a weight: half the memory of bfloat16, at the cost of "
        "some precision (default: %(default)s, all weights in --dtype)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="afterwards read checkpoint and bundle again and compare bit for bit"
    )
    parser.add_argument(
        "--shapes-only",
        action="store_true",
        help="describe the weights and store none: enough for `python -m runtime.export` and AOT compilation",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _convert(options: argparse.Namespace, progress: "_Progress") -> int:
    # Ctrl-C inside the import of an extension module would come out as an ImportError; nothing is lost by ending here.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    import jax

    # Conversion computes nothing; an accelerator would only be taken from whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    from convert.convert import convert
    from keye_jax.errors import CheckpointError, ConfigError
    from runtime.errors import InputError

    signal.signal(signal.SIGINT, handler)
    try:
        bundle = convert(
            options.hf_dir,
            options.bundle,
            dtype=options.dtype,
            indexer_dtype=options.indexer_dtype,
            weights=options.weights,
            verify=options.verify,
            shapes_only=options.shapes_only,
            report=progress,
        )
    except (InputError, ConfigError, CheckpointError, OSError) as error:
        progress.close()
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress.close()
    if bundle.tokenizer_path is None:
        print("note: no tokenizer.json, so this bundle takes token ids and no text", file=sys.stderr)
    size = sum(file.bytes for file in bundle.files.values())
    formats = [bundle.dtype] if bundle.weight_format == "none" else [bundle.dtype, f"{bundle.weight_format} weights"]
    print(
        f"{options.bundle}: {size / 1e6:,.0f} MB, {', '.join(formats)}, indexer {bundle.indexer_dtype}", file=sys.stderr
    )
    return 0


class _Progress(StatusLine):
    """Megabytes, rate and remaining time of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0
        self._total = self._first = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self._total or done < self._first:
            self._started, self._first, self._total = now, done, total
            self.restart()
        if not self.due(now) and done < total:
            return
        line = f"{stage} · {done / 1e6:,.0f}/{total / 1e6:,.0f} MB"
        seconds = now - self._started
        if done > self._first and seconds > 0:
            rate = (done - self._first) / seconds
            line += f" · {rate / 1e6:,.0f} MB/s"
            if done < total:
                line += f" · {_duration((total - done) / rate)} left"
        self.write(line, now)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
