"""The record of a conversion's finished groups, which lets an interrupted one go on where it stopped."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime.errors import InputError

FileEntry = dict[str, Any]
"""{"path", "bytes", "sha256"} of one written file, as in the manifest."""


class Journal:
    """A file of JSON lines, locked while open: the source first, then a line for each finished group.

    A line counts once its end of line is on disk, so a write cut short by a crash reads as not written.
    """

    def __init__(self, path: Path, source: str):
        """Opens or creates the journal; entries of another source are dropped.

        Args:
            source: identifies checkpoint and options.

        Raises:
            InputError: another process holds it.
        """
        self.groups: dict[str, list[FileEntry]] = {}
        """Files of each finished group."""
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{path.parent} is in use by another conversion; wait for it or stop it") from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        good = self._replay(lines, source)
        self._file.truncate(good)
        if not good:
            self._append({"source": source})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, group: str, files: list[FileEntry]) -> None:
        """Records a group whose files are complete on disk."""
        self._append({"group": group, "files": files})
        self.groups[group] = files

    def _replay(self, lines: list[bytes], source: str) -> int:
        """Fills `groups`; returns how many bytes of the file stay."""
        good = 0
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if number == 0 and entry != {"source": source}:
                break
            if number > 0:
                if not isinstance(entry, dict) or set(entry) != {"group", "files"}:
                    break
                self.groups[entry["group"]] = entry["files"]
            good += len(line)
        return good

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
