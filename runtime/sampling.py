"""How tokens are chosen: the options of one request."""

from dataclasses import dataclass

from runtime.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. The same seed draws the same tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature {self.temperature} must be between 0 (greedy) and 100")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.top_k < 1 << 31:
            raise InputError(f"top_k {self.top_k} must be 0 (off) or a positive number of tokens")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed {self.seed} must be between 0 and {(1 << 32) - 1}")
