"""Writing files so that a kill at any moment leaves the previous content whole.

Write beside, then rename: ``atomic_write_text`` and ``atomic_file`` for one file, ``atomic_folder`` for a folder that
changes as one. A failed write (full disk, read-only folder) becomes one ``UserError`` line with the remedy. Nothing is
locked: one process writes a path at a time; in a distributed run, rank 0.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastunlearn.errors import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2), Linux
REMEDIES = {
    errno.ENOSPC: "free some space there or write to another folder",
    errno.EDQUOT: "free some of your quota or write to another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f) or write to another folder",
    errno.EACCES: "make the folder writable or write to another one",
    errno.EPERM: "make the folder writable or write to another one",
    errno.EROFS: "it is a read-only file system; write to another folder",
    errno.ENOTDIR: "a part of the path is a file; write to another folder",
}


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``; a kill leaves either the old or the new content.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; what was written there replaces ``path`` when the block ends well.

    Raises:
        UserError: the file cannot be written. ``path`` is then as it was.
    """
    target, partial = Path(path), sibling(path, "partial")
    with write_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _finish(partial)
            os.replace(partial, target)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it takes the place of ``path`` when the block ends well.

    The previous folder, with everything in it, stays until then and is deleted afterwards.

    Raises:
        UserError: the folder cannot be written. ``path`` is then as it was.
    """
    target, partial = Path(path), sibling(path, "partial")
    with write_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            recover(target)
            remove(partial)
            partial.mkdir()
            yield partial
            flush_folder(partial)
            swap(partial, target)
        except BaseException:
            remove(partial)
            raise


def save_tensors(state: Any, path: Path) -> None:
    """``torch.save`` that tells when the disk took less than all of it; the file stands under its name at once.

    Raises:
        UserError: the file cannot be written.
    """
    import torch

    with write_errors(path):
        torch.save(state, path)
        _finish(path)
        if not zipfile.is_zipfile(path):  # torch ignores what the system says when it closes the file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cache_folder() -> Path:
    """Where what can be made again at any time is kept: ``$XDG_CACHE_HOME/fastunlearn``, by default ``~/.cache``.

    For a user without a home folder a place below ``/dev/null``, where nothing can be read or written: no cache.
    """
    home = os.path.expanduser("~")  # stays as it is for a user that the system does not know
    default = Path(home if os.path.isabs(home) else os.devnull) / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "fastunlearn"


def swap(partial: Path, target: Path) -> None:
    """Give ``partial`` the name ``target``. Where the kernel can exchange two names, no moment is without a target."""
    previous = sibling(target, "previous")
    if not target.exists():
        os.replace(partial, target)
    elif _exchange(partial, target):
        remove(partial)
    else:  # a file system without exchange: a kill between the two renames is repaired by _recover
        os.replace(target, previous)
        os.replace(partial, target)
        remove(previous)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two names in one step with renameat2; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0


def recover(target: Path) -> None:
    """Undo a swap that was killed between its two renames, and drop what a finished one left."""
    previous = sibling(target, "previous")
    if previous.exists():
        if target.exists():
            remove(previous)
        else:
            os.replace(previous, target)


def sibling(path: str | os.PathLike[str], suffix: str) -> Path:
    """``folder/name`` -> ``folder/.name.suffix``: a fixed name, so that leftovers of a kill do not pile up."""
    target = Path(path)
    return target.with_name(f".{target.name}.{suffix}")


def flush_folder(folder: Path) -> None:
    """Bring every file of a folder to the disk, with the mode that new files have."""
    for file in folder.rglob("*"):
        _finish(file)


def _finish(path: Path) -> None:
    """Bring a file to the disk before its name changes, so that a power cut cannot leave an empty new file; and give it
    the mode that the umask asks for, since safetensors makes files that nobody else may read."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # a file system without modes
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Of this process; the system tells it only when it is changed."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, as far as the system lets us; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn failures to write ``target`` into a UserError; other errors of the block pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # writes name no file; opens and makes of folders do
            named = Path(os.fsdecode(error.filename))
            if not (named.is_relative_to(target.parent) or target.is_relative_to(named)):
                raise
        remedy = REMEDIES.get(error.errno or 0, "write to another folder")
        raise UserError(f"cannot write {target}: {error.strerror or error}; {remedy}") from error
    except (SafetensorError, RuntimeError) as error:
        number = _write_failure(str(error))
        if number is None:
            raise
        raise UserError(f"cannot write {target}: {os.strerror(number)}; {REMEDIES[number]}") from error


def _write_failure(text: str) -> int | None:
    """The system's error number behind a message of safetensors or torch.save, None if it is about something else."""
    if "inline_container" in text or "iostream" in text:  # torch.save, which does not say why no bytes were taken
        return errno.ENOSPC
    found = re.search(r"(?:os error|code:) (\d+)", text)
    return int(found[1]) if found and int(found[1]) in REMEDIES else None
