"""Files: written whole or not at all, one writer to a folder, images from elsewhere. Imports no torch."""

import io
import os
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.cli import InputError, reason

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two writers apart
    fcntl = None


def require_file(path, hint):
    """Raises InputError, ending with `hint`, unless `path` is a regular file: reading a pipe would block."""
    if not os.path.isfile(path):
        found = 'is not a file' if os.path.exists(path) else 'no such file'
        raise InputError(f'{path}: {found}; {hint}')


# ---- writing


@contextmanager
def replacing(path):
    """Yield a path beside `path` to write to; when the block ends well, it is synced and renamed to `path`.

    At every moment `path` is the whole old file or the whole new one. If the block raises, the new file is
    removed. An OSError without another file's name becomes an InputError that names `path`.
    """
    target = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    if target.exists() and not target.is_file():  # a folder, or a device or a pipe, which would be replaced, too
        raise InputError(f'{target}: is not a file; expected the name of a file to write')
    # With the process's number, two processes that write one path cannot mix their files.
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
        with suppress(OSError):  # there may be no such folder
            part.unlink()


def sync(path):
    """Wait until the disk has the file, or the folder's list of files."""
    if path.is_dir() and os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def write_file(path, save):
    """Put what `save(file)` writes to a binary file in the place of `path`, whole or not at all."""
    content = io.BytesIO()  # libraries that write to a full disk themselves each fail in their own way
    save(content)
    with replacing(path) as part:
        part.write_bytes(content.getbuffer())


@contextmanager
def lock_folder(folder):
    """Make `folder` and keep other processes that lock it out; raises InputError if one is in there.

    The system drops the lock when this process ends, even if it is killed. Child processes do not inherit
    it. What a killed process left half written is removed. File systems without locks are not locked.
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
        except OSError:  # a network drive without locks
            pass
        for part in folder.glob('*.*.[0-9]*.part'):  # as `replacing` names them
            part.unlink(missing_ok=True)
        yield


# ---- reading images from elsewhere


# What cameras, phones and browsers write. Pillow knows others, and starts a program for one of them (EPS).
IMAGE_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'AVIF')


class UnreadableFile(Exception):
    """An image or an annotation that cannot be used; the message names the file."""


@contextmanager
def open_image(path):
    """Yield the file's PIL image; whatever Pillow raises, also in the block, becomes UnreadableFile."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device can block for ever
        raise UnreadableFile(f'{path}: is not a file')
    try:
        with warnings.catch_warnings():
            # Warnings about readable files: very large, palette transparency, damaged EXIF.
            warnings.simplefilter('ignore')
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                yield image
    except Exception as error:  # damaged files make Pillow's decoders raise errors of any type
        raise UnreadableFile(f'{path}: {reason(error)}') from None


def read_image(path, upright=False):
    """The file's PIL image as RGB, rotated as its EXIF says if `upright`; raises UnreadableFile."""
    with open_image(path) as image:
        return to_rgb(ImageOps.exif_transpose(image) if upright else image)


def to_rgb(image):
    """A PIL image of any mode -> RGB; transparent pixels become white. EXIF rotation is not applied."""
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    elif image.mode.startswith(('I', 'F')):
        # Pillow clips grey of 16 bits and float at 255 instead of scaling it.
        values = np.nan_to_num(np.asarray(image))
        # Floats in [0, 1] may overshoot after resizing; of 0 to 255, an image up to 2 would be black.
        scale = 255 if image.mode == 'F' and values.max() <= 2 else 1 / 256 if values.max() > 255 else 1
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')
