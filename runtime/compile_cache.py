"""JAX's persistent compilation cache in a directory that only this user can write.

Compiled programs are machine code: whoever can write the cache can run code as its reader. So the directory is
private, and one that others can write to is refused, never used with a warning.
"""

import os
import shlex
import stat
from pathlib import Path

from runtime.errors import InputError


def directory() -> Path:
    """Where compiled programs are kept: `keye-jax/compiled` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    if not base or not Path(base).is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise InputError("this user has no home folder for the compilation cache; set XDG_CACHE_HOME") from None
    return Path(base) / "keye-jax" / "compiled"


def enable() -> Path:
    """Turns the cache on for this process, making its directory with mode 0700. Returns the directory.

    Raises:
        InputError: the directory belongs to somebody else, is a link, or others can write to it.
    """
    path = directory()
    # The folder around it too: who can write there can put another one in its place.
    for folder in (path.parent, path):
        _make_private(folder)

    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))
    # Also small programs: a start waits for all of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise InputError(
            f"the compilation cache {path} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder of yours"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise InputError(f"the compilation cache {path} is not a folder of this user; remove it, or set XDG_CACHE_HOME")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"others can write to the compilation cache {path}; empty it and run: chmod 700 {shlex.quote(str(path))}"
        )
