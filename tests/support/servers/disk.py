"""A small disk that a test fills: a file system in memory, which only root may mount."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.servers.errors import ServerUnavailable


class SmallDisk:
    """A folder with room for a few megabytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no room."""
        with self._ballast.open("wb", buffering=0) as ballast:
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while ballast.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A disk of *megabytes*, mounted on *folder* with what is in it; unmounted at the end.

    Raises:
        ServerUnavailable: this user may not mount one.
    """
    before = list(folder.iterdir())
    kept = folder.with_name(f"{folder.name}-before")
    shutil.copytree(folder, kept)
    options = f"size={megabytes}m,mode=0777"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True, text=True)
    except OSError as error:
        raise ServerUnavailable(f"No small disk here: {error}") from error
    if done.returncode:
        raise ServerUnavailable(f"No small disk here: {done.stderr.strip()}. It takes root.")
    try:
        for each in before:
            shutil.copy2(kept / each.name, folder)
        yield SmallDisk(folder)
    finally:
        # Lazily: a server may still have a file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(kept)
