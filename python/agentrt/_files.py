"""Output files: complete or absent, never half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from agentrt.errors import FileAccessError


def check_writable(path: Path) -> None:
    """Raises before any work is done where ``path`` could not be written after it."""
    folder = path.absolute().parent
    if path.is_dir():
        raise FileAccessError(str(path), "is a directory; name a file")
    if not folder.is_dir():
        raise FileAccessError(str(path), f"the directory {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise FileAccessError(str(path), f"the directory {folder} is not writable; choose another")


def write_atomically(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames, so that a reader sees the old file or the whole new one."""
    check_writable(path)
    folder = path.absolute().parent
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise FileAccessError(str(path), error.strerror or str(error)) from error
