"""One process at a time writes a folder: a lock that the system drops when its owner ends, however that happens."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastunlearn.errors import UserError
from fastunlearn.utils.files import write_errors
from fastunlearn.utils.run_folder import LOCK

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
MAX_BYTES = 4096


@contextmanager
def folder_lock(folder: Path, field: str) -> Iterator[None]:
    """Hold the folder, which is made where it does not exist; it goes again if nothing was written into it.

    ``field``: what the message begins with.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with write_errors(folder / LOCK):
        file = _open(folder, field)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before others can have it: see _open
        os.close(file)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _open(folder: Path, field: str) -> int:
    """A descriptor of the locked file. One that was unlinked by its owner in between is opened anew."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder has just been removed by a process that wrote nothing
            continue
        except FileExistsError:  # so it has while mkdir looked whether it is one
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(file) if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else ""
            if error.errno not in NO_LOCKS:
                os.close(file)
            if owner:
                raise UserError(
                    f"{field}: {str(folder)!r} is in use by {owner}; wait until it has ended, or choose another folder"
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            print(f"note: {folder} is on a file system without locks; let no other run write there", file=sys.stderr)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(folder / LOCK, follow_symlinks=False)):
                _sign(file)
                return file
        os.close(file)


def _sign(file: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.truncate(file, 0)
    os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode(), 0)


def _owner(file: int) -> str:
    """Who holds the lock, as it says itself; it may be about to."""
    for _ in range(20):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            said = json.loads(os.pread(file, MAX_BYTES, 0))
            return f"process {int(said['pid'])} on {str(said['host'])[:80]} since {str(said['since'])[:40]}"
        time.sleep(0.05)
    return "another process"
