"""Files: written whole or not at all, one writer to a folder. Imports no torch."""

import io
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from support.cli import InputError, reason

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two writers apart
    fcntl = None


def require_file(path, hint):
    """Raise InputError, ending with `hint`, unless `path` is a regular file: reading a pipe would block."""
    if not os.path.isfile(path):
        found = 'is not a file' if os.path.exists(path) else 'no such file'
        raise InputError(f'{path}: {found}; {hint}')


@contextmanager
def replacing(path):
    """Yield a path beside `path` to write to; when the block ends well, it is synced and renamed to `path`.

    At every moment `path` is the whole old file or the whole new one. If the block raises, the new file is removed.
    An OSError becomes an InputError that names `path`, unless it has the name of another file.
    """
    target = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    if target.exists() and not target.is_file():  # a rename would replace a device or a pipe, too
        raise InputError(f'{target}: is not a file; expected the name of a file to write')
    # With the process's number, so that two processes that write to one path cannot mix their files.
    part = target.with_name(f'{target.name}.{os.getpid()}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        os.replace(part, target)
        sync(target.parent)
    except OSError as error:
        if error.filename not in (None, str(part), str(target.parent)):
            raise
        raise InputError(f'{target}: cannot be written and is left as it was ({reason(error)})') from None
    finally:
        with suppress(OSError):  # it has been renamed, or never was
            part.unlink()


def sync(path):
    """Wait until the disk has the file, or the folder's list of files."""
    if path.is_dir() and os.name != 'posix':
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path, save):
    """Put what `save(file)` writes to a binary file in the place of `path`, whole or not at all."""
    content = io.BytesIO()  # in memory first, because each library fails in its own way on a full disk
    save(content)
    with replacing(path) as part:
        part.write_bytes(content.getvalue())


@contextmanager
def lock_folder(folder):
    """Make `folder` and lock it for this process; raises InputError if another process has locked it.

    The lock ends with this process, even if it is killed, and child processes do not inherit it. What a killed process
    left half written is removed. On a file system without locks, nothing keeps other processes out.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / '.lock', 'w')
    except OSError as error:
        raise InputError(f'{folder}: cannot be written to ({reason(error)}); choose another folder') from None
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f'{folder}: another process is writing to this folder; wait for it, stop it, or choose another folder'
            ) from None
        except OSError:  # a file system without locks, as of some network drives
            pass
        for part in folder.glob('*.*.[0-9]*.part'):  # as `replacing` names them
            part.unlink(missing_ok=True)
        yield
