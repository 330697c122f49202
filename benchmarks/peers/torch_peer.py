"""The peer: transformers' dense Qwen3-VL-MoE text model at Keye-VL-2.0's sizes, random weights, one GPU.

    python -m benchmarks.peers.torch_peer OUT.json --contexts 8192 32768

Prefill runs the whole prompt at once (SDPA and grouped experts); decode runs eagerly over the cache that it leaves.
Needs torch and transformers and nothing of this repository. `--tiny` shrinks the model, for trying the script on a CPU.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import DynamicCache, Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

VOCABULARY = 151936
LONG = 65536
"""Tokens of the longest prompt that is prefilled twice."""

ROPE = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [16, 24, 24], "mrope_interleaved": True}


def make_config(*, tiny: bool) -> Any:
    """The published sizes, or two narrow layers of them."""
    config = Qwen3VLMoeTextConfig(
        vocab_size=512 if tiny else VOCABULARY,
        hidden_size=128 if tiny else 2048,
        intermediate_size=64 if tiny else 6144,
        num_hidden_layers=2 if tiny else 48,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 4,
        head_dim=128,
        num_experts=8 if tiny else 128,
        num_experts_per_tok=2 if tiny else 8,
        moe_intermediate_size=64 if tiny else 768,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
    )
    config.rope_parameters = dict(ROPE)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    return config


def make_model(config: Any, device: str) -> Any:
    """Random bfloat16 weights drawn on the device."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Qwen3VLMoeTextModel(config)
    model = model.to_empty(device=device).eval()
    theta, half = config.rope_parameters["rope_theta"], torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:
                buffer.copy_(1.0 / theta ** (half / config.head_dim))
    return model


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds, waiting for the device before and after."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(model: Any, context: int, steps: int, device: str) -> dict[str, float]:
    """Prefill, then `steps` single tokens, of which the median counts. Short prompts are prefilled twice, of which the
    second counts; long ones, which take seconds, follow shorter ones and are warm."""
    hidden = model.config.hidden_size
    x = torch.randn(1, context, hidden, device=device, dtype=torch.bfloat16)
    positions = torch.arange(context, device=device)[None, None].expand(3, 1, context)
    cache, prefill_s = None, 0.0
    for _ in range(1 if context > LONG else 2):
        cache = DynamicCache(config=model.config)
        call = {"inputs_embeds": x, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        prefill_s = timed(lambda call=call: model(**call), device)
    taken = []
    for i in range(steps):
        place = torch.full((3, 1, 1), context + i, device=device)
        call = {"inputs_embeds": x[:, :1], "position_ids": place, "past_key_values": cache, "use_cache": True}
        taken.append(timed(lambda call=call: model(**call), device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {
        "prefill_s": round(prefill_s, 4),
        "decode_ms": round(sorted(taken)[len(taken) // 2] * 1e3, 3),
        "peak_gib": round(peak, 2),
    }


def versions() -> dict[str, Any]:
    """The start of a result."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def run(model: Any, contexts: list[int], steps: int, device: str, result: dict[str, Any], out: str) -> None:
    """Fills result["contexts"] and writes the result after every context."""
    rows = result.setdefault("contexts", {})
    for context in contexts:
        try:
            rows[str(context)] = measure(model, context, steps, device)
        except (RuntimeError, ValueError) as error:  # out of memory is one; the other contexts stand
            rows[str(context)] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"peer, eager, {context}: {rows[str(context)]}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        with open(out, "w", encoding="utf-8") as file:
            json.dump(result, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.json")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--steps", type=int, default=8, help="decode steps (default 8)")
    parser.add_argument("--tiny", action="store_true", help="a model of toy sizes")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(make_model(make_config(tiny=args.tiny), device), args.contexts, args.steps, device, versions(), args.out)


if __name__ == "__main__":
    main()
