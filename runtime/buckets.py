"""The static shapes of the compiled programs, chosen in one place. Few sizes: each is a compilation."""

from collections.abc import Sequence

from runtime.errors import InputError

CONTEXTS = (512, 2048, 8192, 32768, 65536, 131072, 262144)
"""Cache capacities in tokens. A sequence starts in the smallest that holds its prompt and moves up as it grows."""

CHUNKS = (64, 512)
"""Prompt tokens per prefill step."""

GPU_CHUNKS = (64, 512, 2048, 8192)
"""The same where the GPU kernels run: an expert needs hundreds of rows to be busy, and scores take no memory."""

EXPLAIN_CHUNK = 64
"""Tokens of an answer that are explained at once."""

BATCH_PATCHES = 8192
"""Patches per call of the vision program, unless one image alone has more."""

GPU_BATCH_PATCHES = 65_536
"""The same where the GPU kernels run: from here on larger batches gain less than 5 %."""

MAX_PATCHES = 131_072
"""Patches of the largest image that preprocessing lets through, as a power of two."""

_MIN_PATCHES = 256
_CAPACITY_STEP = 128


def context_limit(max_position_embeddings: int) -> int:
    """Tokens, prompt and answer together, that one sequence may hold."""
    return min(max_position_embeddings, CONTEXTS[-1])


def context(tokens: int, limit: int, devices: int = 1) -> int:
    """Cache capacity for `tokens`.

    Args:
        limit: the model's context.
        devices: that the cache is spread over.

    Raises:
        InputError: more tokens than `limit`, the model's context.
    """
    if tokens > limit:
        raise InputError(
            f"{tokens} tokens do not fit the model's context of {limit}; use fewer or smaller images and frames "
            "(--max-frames, --max-pixels), a shorter text, or a smaller --max-new-tokens"
        )
    return next(c for c in contexts(limit, devices) if tokens <= c)


def contexts(limit: int, devices: int = 1) -> tuple[int, ...]:
    """The capacities in use for a model whose context is `limit`, ascending; the last one holds it."""
    step = _CAPACITY_STEP * devices
    return tuple(sorted({-(-min(size, limit) // step) * step for size in (*CONTEXTS, limit)}))


def chunks(platform: str, plain: bool) -> tuple[int, ...]:
    """The chunk lengths of a platform, with its kernels or without."""
    return GPU_CHUNKS if platform == "cuda" and not plain else CHUNKS


def batch_patches(platform: str, plain: bool) -> int:
    """Most patches per call of the vision program, unless one image alone has more."""
    return GPU_BATCH_PATCHES if platform == "cuda" and not plain else BATCH_PATCHES


def share(total: int, devices: int, most: int) -> int:
    """Most patches that each device takes of `total` at a time: no call leaves devices idle that it could spare.

    Args:
        most: of the platform, from `batch_patches`.
    """
    return min(most, patches(-(-total // devices)))


def chunk(prompt_tokens: int, exported: Sequence[int], standard: Sequence[int]) -> int:
    """Chunk length of a prompt's prefill: of the exported ones the smallest that holds the prompt, else the largest.

    Args:
        exported: lengths that there are graphs for.
        standard: the platform's, from `chunks`.
    """
    wanted = next((c for c in standard if prompt_tokens <= c), standard[-1])
    best = min((c for c in exported if c >= prompt_tokens), default=max(exported, default=wanted))
    # A graph for short prompts does not keep longer ones from getting their own.
    return wanted if best == standard[0] < wanted else best


def patches(count: int) -> int:
    """Patches the vision program is compiled for: the next power of two."""
    return max(_MIN_PATCHES, 1 << (count - 1).bit_length())


def all_shapes(
    limit: int, standard: Sequence[int], *, batch: int = 1, devices: int = 1, explain: bool = False
) -> list[tuple[str, tuple[int, ...]]]:
    """Every (program, shape) that a model of context `limit` can come to need; see `runtime.graphs.SHAPE_NAMES`.

    Args:
        standard: chunk lengths, from `chunks`.
        explain: with the programs that explain answers.
    """
    sizes = contexts(limit, devices)
    # The shortest prompts take the shortest chunk, others the one that holds the context they are in.
    prefills = sorted({(batch, chunk(1, (), standard), sizes[0]), *((batch, chunk(s, (), standard), s) for s in sizes)})
    patch_sizes = [1 << n for n in range(_MIN_PATCHES.bit_length() - 1, MAX_PATCHES.bit_length())]
    return [
        *(("vision", (size,)) for size in patch_sizes),
        *(("prefill", shape) for shape in prefills),
        *(("decode", (batch, size)) for size in sizes),
        *(("explain", (batch, EXPLAIN_CHUNK, size)) for size in sizes if explain),
    ]
