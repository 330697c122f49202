"""Trains the tiny model from scratch on synthetic videos.

    python -m examples.train_tiny FOLDER [--seed N] [--steps S] [--clips C] [--workers N]

Three phases, as the paper has them: next-token training with dense attention on clips that grow longer; the indexer
alone, towards the dense attention distribution; everything together with attention over the indexer's selection.
FOLDER gets `state.npz` while training goes on (run the command again to continue), `log.jsonl`, and at the end
`checkpoint/` in the official layout.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="made if missing; training continues from it")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights and other clips (default 0)")
    parser.add_argument("--steps", type=float, default=1.0, help="times the usual number of steps (default 1)")
    parser.add_argument("--clips", type=float, default=1.0, help="times the usual clips a batch (default 1)")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches (default 8)")
    parser.add_argument("--save-every", type=float, default=60, metavar="S", help="seconds between states (default 60)")
    args = parser.parse_args()

    # Not above: the processes that make batches load this module, and have no use for JAX.
    from examples.train_tiny.training import train

    try:
        size = train(args.folder, args.seed, args.steps, args.clips, args.workers, args.save_every)
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {args.folder / 'state.npz'}", file=sys.stderr)
        return 130
    print(f"{args.folder / 'checkpoint'}: {size / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
