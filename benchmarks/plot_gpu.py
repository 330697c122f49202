"""`python -m benchmarks.plot_gpu [RESULT.json]`: prefill and decode times against the context, as two pictures.

Ours with sparse attention, ours with dense attention, the peer and the floor, from what `python -m benchmarks.gpu`
wrote; next to it RESULT-prefill.png and RESULT-decode.png. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.gpu.report import floor_of

RESULT = Path(__file__).parent / "results" / "gpu-h200.json"

INK, GRID = "#222222", "#e4e4e4"
CURVES: dict[str, tuple[str, str, str]] = {
    "dsa_random": ("ours, sparse, random selections", "#0b6e4f", "o-"),
    "dsa_local": ("ours, sparse, local selections", "#5bbf8f", "o--"),
    "dsa": ("ours, sparse", "#0b6e4f", "o-"),
    "dense": ("ours, dense", "#2f6fb7", "s-"),
    "peer": ("transformers, dense", "#c2571a", "^-"),
    "floor": ("floor of the sparse model", "#888888", ":"),
}
LABEL_BY = {"dsa_random": (7, 3), "dsa_local": (7, -10), "peer": (-12, 9)}
"""Points from a curve's end to its last value, where that would lie on another curve's; else to the right of it."""


def prefill_points(data: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Seconds by curve and context; floors at every context that has a time."""
    rows = {int(context): row for context, row in data.get("prefill_s", {}).items()}
    points = {name: {c: row[name] for c, row in rows.items() if name in row} for name in CURVES}
    return {**points, "floor": {c: floor_of(data, context=c) for c in rows}}


def decode_points(data: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Milliseconds a step at batch 1."""
    rows = {int(context): row for context, row in data.get("decode_ms", {}).get("1", {}).items()}
    points = {name: {c: row[name] for c, row in rows.items() if name in row} for name in CURVES}
    return {**points, "floor": {c: 1e3 * floor_of(data, context=c, batch=1) for c in rows}}


def draw(points: dict[str, dict[int, float]], title: str, unit: str, path: Path) -> None:
    """Writes one picture, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), dpi=160)
    for name, (label, colour, style) in CURVES.items():
        curve = sorted(points.get(name, {}).items())
        if curve:
            contexts, values = zip(*curve, strict=True)
            axes.plot(contexts, values, style, color=colour, label=label, linewidth=1.8, markersize=5)
            if name != "floor":
                place, last = LABEL_BY.get(name, (7, -3)), f"{values[-1]:.3g}"
                axes.annotate(last, curve[-1], place, textcoords="offset points", color=colour, fontsize=8)
    _dress(axes, sorted({c for curve in points.values() for c in curve}))
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("context, tokens", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=INK)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _dress(axes: Axes, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.09, y=0.09)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_gpu", description="Draw a benchmark's result.")
    parser.add_argument("result", nargs="?", type=Path, default=RESULT, metavar="RESULT.json")
    path = parser.parse_args().result
    data = json.loads(path.read_text(encoding="utf-8"))
    device = f"30B model, random weights, one {data.get('device', 'GPU')}"
    prefill, decode = (path.with_name(f"{path.stem}-{name}.png") for name in ("prefill", "decode"))
    draw(prefill_points(data), f"Prefill, {device}", "seconds", prefill)
    draw(decode_points(data), f"Decode, batch 1, {device}", "milliseconds a token", decode)
    print(prefill, decode, sep="\n")


if __name__ == "__main__":
    main()
