"""`make demo`: from a checkpoint to an answer that can be checked.

    python -m examples.demo [CHECKPOINT] [--folder FOLDER] [--clip N]

Renders a clip that training has not seen as mp4, converts the checkpoint (the small trained one in examples/tiny_keye),
lets the bundle answer when something happens in the clip, and draws the frames that were selected while it wrote the
answer, with the answer's interval and the true one.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from examples.train_tiny.held_out import sample_clip, write_clip
from examples.train_tiny.questions import Question
from examples.train_tiny.scenes import states
from runtime.engine import Engine, Generation
from runtime.errors import GenerationError, InputError
from runtime.explain_picture import draw
from runtime.progress import ProgressLine
from runtime.sampling import SamplingOptions
from runtime.spans import Span

SEED = 2
"""Of the held-out clips; `python -m examples.train_tiny.held_out` writes those of seed 1."""
MAX_NEW_TOKENS = 256
TRAINED = Path(os.path.relpath(Path(__file__).parent / "tiny_keye"))


def demo(checkpoint: Path, folder: Path, clip: int = 0) -> Path:
    """Runs it and prints what happens. `folder` gets clip.mp4, bundle and answer.png.

    Args:
        checkpoint: in the official layout, made by `python -m examples.train_tiny`.
        clip: the first number of a held-out clip to try; the next one with a "when" question is taken.

    Returns:
        The picture's path.

    Raises:
        InputError: the checkpoint cannot be converted or run.
        GenerationError: the answer could not be computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    video, bundle, picture = (folder / name for name in ("clip.mp4", "bundle", "answer.png"))
    question, truth = write_question(video, clip)
    _run("convert", str(checkpoint), str(bundle), "--dtype", "float32", "--verify")
    # Not as a command, which does not know the true interval; it says and draws the rest.
    options = ["--video", str(video), "--prompt", question.text, "--temperature", "0", "--explain", str(picture)]
    print(f"\nlike python -m runtime.generate {bundle} {shlex.join(options)}")
    print(f"Question:    {question.text}")
    progress = ProgressLine()
    engine = Engine.load(bundle, progress=progress)
    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": question.text}]
    prompt = engine.prepare([{"role": "user", "content": content}])
    generation = engine.generate_prompt(prompt, max_new_tokens=MAX_NEW_TOKENS, sampling=SamplingOptions(), explain=True)
    _stream(generation, progress)
    result = generation.result
    timings = result.timings
    print(f"True answer: {question.answer}")
    print(
        f"{result.attention_path}; {result.prompt_tokens} prompt tokens, {len(result.token_ids)} new; compilation "
        f"{timings['compile_s']:.1f} s, vision {timings['vision_s']:.2f} s, prefill {timings['prefill_s']:.2f} s, "
        f"decode {timings['decode_s']:.2f} s"
    )
    draw(generation.explanation(), prompt.media, picture, question=question.text, truth=truth)
    print(f"{picture}: the frames that it looked at, with its interval and the true one")
    python = os.path.relpath(sys.executable)
    print(f"\nAsk more: {python} -m runtime.generate {bundle} --video {video} --prompt 'What happens in this video?'")
    return picture


def write_question(video: Path, number: int) -> tuple[Question, Span]:
    """Renders the first held-out clip from `number` on that has a "when" question; the question and its interval in
    the frames that are taken."""
    while True:
        scene, timeline, questions = sample_clip(SEED, number)
        for question in questions:
            if question.event is not None:
                write_clip(video, scene, timeline)
                start, end = question.event.span(states(scene, timeline.times), timeline.times)
                return question, (float(start), float(end))
        number += 1


def _stream(generation: Generation, progress: ProgressLine) -> None:
    channel = None
    for piece in generation:
        if piece.channel != channel:
            progress.close()
            name = "Thinking:    " if piece.channel == "thinking" else "Answer:      "
            print(name if channel is None else "\n" + name, end="")
            channel = piece.channel
        print(piece.text, end="", flush=True)
    print()


def _run(module: str, *arguments: str) -> None:
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        raise InputError(f"the command above failed with exit code {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        nargs="?",
        default=TRAINED,
        help="made by `python -m examples.train_tiny` (default: the one in examples/tiny_keye)",
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="for what it makes (default: %(default)s)")
    parser.add_argument("--clip", type=int, default=0, metavar="N", help="another number, another clip (default 0)")
    args = parser.parse_args()
    try:
        demo(args.checkpoint, args.folder, args.clip)
    except (GenerationError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
