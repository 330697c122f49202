"""The result as it grows: written after every figure, so that a run that is cut short keeps what it has."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Record:
    """A JSON document on disk, and the time left to fill it.

    Args:
        path: written atomically at every change.
        seconds: after this much time, `allows` says no.
    """

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.failures = 0
        self._end = time.monotonic() + seconds

    def put(self, keys: Sequence[object], value: Any) -> None:
        """Sets the value under nested keys and writes the file."""
        node = self.data
        for key in keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(keys[-1])] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def get(self, *keys: object) -> Any:
        """The value under nested keys; None where there is none."""
        node: Any = self.data
        for key in keys:
            node = node.get(str(key)) if isinstance(node, dict) else None
        return node

    def attempt(self, keys: Sequence[object], seconds: float, measure: Callable[[], Any]) -> Any:
        """Puts what `measure` returns, if `seconds` are left. Whatever it raises takes one figure, not the others, and
        is counted in `failures`. Returns the value, or None."""
        if not self.allows(seconds, *keys):
            return None
        try:
            value = measure()
        except Exception as error:
            name = ".".join(map(str, keys))
            self.failures += 1
            self.put(("failed", name), f"{type(error).__name__}: {error}"[:500])
            print(f"{name} FAILED: {type(error).__name__}: {str(error)[:500]}", flush=True)
            return None
        if value is not None:
            self.put(keys, value)
        return value

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def allows(self, seconds: float, *keys: object) -> bool:
        """Whether something that takes `seconds` still fits; if not, the result says that it was left out."""
        if seconds <= self.left:
            return True
        name = ".".join(map(str, keys))
        self.put(("left_out", name), f"would take about {seconds:.0f} s of the {max(self.left, 0):.0f} s left")
        print(f"{name}: left out for lack of time", flush=True)
        return False
