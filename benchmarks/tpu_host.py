"""What the benchmarks that compile for absent TPUs share: the compiler, and the record of what it said."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.aot import without_chips


def prepare() -> str | None:
    """Readies this process, before it imports jax. Returns libtpu's version, or None, said on stderr, without it."""
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        print('error: libtpu is not installed; pip install "keye-jax[tpu]" (make tpu-aot does)', file=sys.stderr)
        return None
    without_chips()
    return libtpu


def write_record(path: Path, module: str, libtpu: str, rows: Sequence[Any], **facts: Any) -> None:
    """Writes dataclass rows as JSON, with the command line of `module` that made them and the versions in use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "jax": version("jax"),
        "libtpu": libtpu,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **facts,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
