"""The peer's decode at its best: the same dense model, a static cache, and a whole step in one CUDA graph.

    python -m benchmarks.peers.torch_peer_graph OUT.json --contexts 8192 131072 --batches 1 8

Both of transformers' expert implementations are tried; the faster one counts. Needs torch and transformers. On a CPU,
which has no graphs, the step runs as it is: for trying the script with `--tiny`.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.peers import torch_peer
from benchmarks.peers.torch_peer import make_config, make_model, timed

EAGER_STEPS = 8

SLACK = 64
"""Slots of the cache beyond the context."""


def measure(model: Any, head: Any, context: int, batch: int, device: str) -> float:
    """Milliseconds a step: the median of twelve."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + SLACK)
    x = torch.randn(batch, 1, config.hidden_size, device=device)
    call = {
        "inputs_embeds": x,
        "attention_mask": torch.ones(batch, 1, 1, context + SLACK, dtype=torch.bool, device=device),
        "position_ids": torch.full((3, batch, 1), context, device=device),
        "past_key_values": cache,
        "use_cache": True,
        "cache_position": torch.tensor([context], device=device),
    }

    def step() -> torch.Tensor:
        return head(model(**call).last_hidden_state)

    replay = captured(step) if device == "cuda" else step
    return 1e3 * sorted(timed(replay, device) for _ in range(12))[6]


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the step, warmed up on another stream as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.json")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="one for each context, or one for all")
    parser.add_argument("--eager", type=int, nargs="*", default=[], help="contexts for torch_peer, with these weights")
    parser.add_argument("--tiny", action="store_true", help="a model of toy sizes")
    args = parser.parse_args()
    batches = args.batches * len(args.contexts) if len(args.batches) == 1 else args.batches
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(make_config(tiny=args.tiny), device)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device=device)
    result: dict[str, Any] = {**torch_peer.versions(), "decode_ms": {}}
    torch_peer.run(model, args.eager, EAGER_STEPS, device, result, args.out)
    for experts in ("grouped_mm", "batched_mm"):
        model.config._experts_implementation = experts
        for batch, context in zip(batches, args.contexts, strict=True):
            rows = result["decode_ms"].setdefault(str(batch), {}).setdefault(str(context), {})
            try:
                rows[experts] = round(measure(model, head, context, batch, device), 3)
            except (RuntimeError, ValueError, TypeError) as error:  # out of memory, or not capturable
                rows[experts] = f"{type(error).__name__}: {error}"[:300]
            print(f"peer, CUDA graph, batch {batch}, {context}, {experts}: {rows[experts]}", flush=True)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main()
