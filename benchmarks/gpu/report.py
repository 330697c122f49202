"""The result as tables for a person: beside the peer, what must be reached, the goal, and the floor."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.floors import H200, Rates, decode_seconds, prefill_seconds
from benchmarks.published import CONFIG
from keye_jax.config import KeyeConfig

MUST_GOAL: dict[tuple[str, ...], tuple[float, float]] = {
    ("prefill_s", "32768"): (1.2, 0.7),
    ("prefill_s", "131072"): (7, 4),
    ("prefill_s", "262144"): (24, 11),
    ("decode_ms", "1", "8192"): (6, 2.6),
    ("decode_ms", "1", "131072"): (7, 3.0),
    ("decode_ms", "1", "262144"): (8, 3.4),
    ("vit_s",): (2.5, 1.3),
    ("grouped_gemm_tflops",): (300, 450),
    ("peak_gib", "262144"): (139, 100),
}
"""On one H200, by where the figure stands in the result: at most (of TFLOP/s: at least) so much."""


def tables(data: dict[str, Any]) -> str:
    """All tables of a result, whatever of it there is."""
    parts = [_title(data), *_prefill(data), *_decode(data), *_others(data), *_stages(data), *_gaps(data)]
    return "\n".join(parts)


def floor_of(data: dict[str, Any], *, context: int, batch: int | None = None, dense: bool = False) -> float:
    """Seconds: of a prefill, or with a batch of a decode step, at the rates that the run measured."""
    config = KeyeConfig.from_hf(CONFIG)
    rates = data.get("rates")
    rates = Rates(rates["tflops"] * 1e12, rates["tb_per_s"] * 1e12) if rates else H200
    if batch is None:
        return prefill_seconds(config, context, rates, dense=dense)
    return decode_seconds(config, context, batch, rates, dense=dense)


def _title(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items())
    checks = data.get("checks", {}).values()
    passed, kernels = (sum(check[name] for check in checks) for name in ("passed", "custom_kernel"))
    rates = data.get("rates", {})
    return (
        f"\n{data.get('device', 'no device')}, {versions}, commit {data.get('commit')}\n"
        f"{rates.get('tflops')} TFLOP/s bfloat16 and {rates.get('tb_per_s')} TB/s measured; "
        f"{passed} of {len(checks)} checks passed, {kernels} of them with kernels of ours"
    )


def _prefill(data: dict[str, Any]) -> Iterator[str]:
    rows = data.get("prefill_s", {})
    if rows:
        yield f"\n{'prefill, seconds':<18}" + "".join(f"{name:>12}" for name in _PREFILL)
        for context, row in sorted(rows.items(), key=lambda item: int(item[0])):
            floor = floor_of(data, context=int(context)) if data.get("config") == "30b" else None
            best = row.get("dsa_random")
            values = {
                **row,
                **_targets("prefill_s", context),
                "floor": floor,
                "% of floor": 100 * floor / best if floor and best else None,
                "tokens/s": int(context) / best if best else None,
                "dense/dsa": row["dense"] / best if best and "dense" in row else None,
                "peak GiB": data.get("peak_gib", {}).get(context),
            }
            yield f"{int(context):<18,}" + "".join(_cell(values.get(name)) for name in _PREFILL)


_PREFILL = ("dsa_random", "dsa_local", "dense", "peer", "must", "goal", "floor", "% of floor", "tokens/s", "dense/dsa",
            "peak GiB")  # fmt: skip


def _decode(data: dict[str, Any]) -> Iterator[str]:
    rows = data.get("decode_ms", {})
    if rows:
        yield f"\n{'decode, ms a step':<18}" + "".join(f"{name:>12}" for name in _DECODE)
        for batch, contexts in sorted(rows.items(), key=lambda item: int(item[0])):
            for context, row in sorted(contexts.items(), key=lambda item: int(item[0])):
                known = data.get("config") == "30b"
                floor = 1e3 * floor_of(data, context=int(context), batch=int(batch)) if known else None
                best = row.get("dsa")
                values = {
                    **row,
                    **_targets("decode_ms", batch, context),
                    "floor": floor,
                    "% of floor": 100 * floor / best if floor and best else None,
                    "tokens/s": 1e3 * int(batch) / best if best else None,
                    "dense/dsa": row["dense"] / best if best and "dense" in row else None,
                }
                yield f"{batch + ' x ' + format(int(context), ','):<18}" + "".join(
                    _cell(values.get(name)) for name in _DECODE
                )


_DECODE = ("dsa", "dense", "peer", "must", "goal", "floor", "% of floor", "tokens/s", "dense/dsa")


def _others(data: dict[str, Any]) -> Iterator[str]:
    names = {"vit_s": "vision, s", "grouped_gemm_tflops": "experts, TFLOP/s"}
    rows = [(title, data[name], _targets(name)) for name, title in names.items() if data.get(name)]
    longest = max(data.get("peak_gib", {}), key=int, default=None)
    if longest:
        rows.append((f"peak GiB at {longest}", data["peak_gib"][longest], _targets("peak_gib", longest)))
    if rows:
        yield f"\n{'':<18}{'measured':>12}{'must':>12}{'goal':>12}"
        for title, value, targets in rows:
            yield f"{title:<18}{_cell(value)}{_cell(targets.get('must'))}{_cell(targets.get('goal'))}"


def _stages(data: dict[str, Any]) -> Iterator[str]:
    for kind, names in data.get("stages", {}).items():
        for name, stages in names.items():
            yield f"\n{kind} {name:<24}{'us a call':>12}{'calls':>12}{'ms':>12}{'% of floor':>12}"
            for stage, row in stages.items():
                cells = (row["us"], row["calls"], row["us"] * row["calls"] / 1e3, row["percent_of_floor"])
                yield f"  {stage:<28}" + "".join(_cell(value) for value in cells)


def _gaps(data: dict[str, Any]) -> Iterator[str]:
    """What is missing, and why."""
    for title in ("left_out", "failed"):
        for name, reason in data.get(title, {}).items():
            yield f"{title.replace('_', ' ')}: {name}: {reason}"
    for name in data.get("failed_to_compile", []):
        yield f"does not compile: {name}"
    if isinstance(data.get("peer"), str):
        yield f"peer {data['peer']}"


def _targets(*keys: str) -> dict[str, float]:
    must, goal = MUST_GOAL.get(keys, (None, None))
    return {"must": must, "goal": goal} if must is not None and goal is not None else {}


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'–':>12}"
    return f"{value:>12,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:>12.3g}"
