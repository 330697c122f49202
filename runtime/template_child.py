"""Renders one chat template: JSON on stdin, JSON on stdout.

`runtime.template` runs this file as a process of its own, which it can kill. A template comes with the
weights from wherever these came from: it gets jinja2's immutable sandbox, a memory and CPU limit, no files
to write, and none of the parent's memory or environment. Imports nothing of this package.
"""

import json
import re
import sys
from typing import Any


def limit_resources(cpu_seconds: int, memory_bytes: int) -> None:
    """Hard limits of this process, where the platform has them; the parent's timeout holds everywhere."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere the address space of a fresh process may already be larger
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def render(template: str, variables: dict[str, Any], sentinel: str, max_characters: int) -> str:
    """The rendered text. Raises jinja2's errors, ValueError (also from the template's own
    raise_exception)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **unknown: Any) -> str:
        if unknown:
            raise ValueError(f"tojson with {sorted(unknown)} is not supported")
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, allow_nan=False)
        # The text behind a sentinel has to be escaped when it is put back: kind 0 becomes kind 1.
        return re.sub(sentinel, lambda match: f"_{match[1]}_1_{match[3]}_", text)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    pieces, total = [], 0
    for piece in environment.from_string(template).generate(**variables):
        total += len(piece)
        if total > max_characters:
            raise ValueError(f"it writes more than {max_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    job = json.load(sys.stdin.buffer)
    limit_resources(job["cpu_seconds"], job["memory_bytes"])
    try:
        result = {"text": render(job["template"], job["variables"], job["sentinel"], job["max_characters"])}
    except MemoryError:
        result = {"error": "it needs more memory than a template may have"}
    except Exception as error:  # jinja2 passes on whatever the template's expressions raise
        result = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.buffer.write(json.dumps(result).encode())


if __name__ == "__main__":
    main()
