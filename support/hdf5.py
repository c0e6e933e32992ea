"""HDF5 files: their schema, opening, checking, creating, and reading a sample. Imports no torch.

The original's files are a dataset each, named after the file: `images.h5` holds `images`. `data_rechunk.py`
adds `chunked_images`, a second name of the same data.
"""

import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from support.cli import InputError, are_names, ignore_signals, reason, signals_blocked
from support.files import require_file

try:
    import resource
except ImportError:  # Windows
    resource = None

# ---- schema

SPLITS = ('train', 'val', 'test')

# Shape of each file's dataset; N is the number of samples, H and W the height and width of the images.
SHAPES = {
    'images': ('N', 'H', 'W', 3),
    'masks': ('N', 'H', 'W', 1),
    'bboxes': ('N', 4),
    'binary': ('N', 1),
    'breeds': ('N', 1),
}
OPTIONAL = ('breeds',)  # the original's files have no breeds

MASK_UNKNOWN = 255  # in a mask: not known whether the pixel shows the pet

LARGEST_SIDE = 4096  # pixels of an image's height or width
LARGEST_RATIO = 1100  # of a dataset's size to what is stored of it; gzip's best is 1032


def is_image_size(*sides):
    """Whether the networks take images with these sides in pixels."""
    return all(64 <= side <= LARGEST_SIDE and side % 16 == 0 for side in sides)


def target_chunks(dataset):
    """The chunk shape after rechunking: an image or a mask each, a table of labels as a whole.

    A box is 16 bytes and a label 1 or 2; in chunks of their own, each would cost a read and an index entry.
    """
    return (1, *dataset.shape[1:]) if dataset.ndim == 4 else dataset.shape


def is_rechunked(file, stem, checksums=False):
    """Whether an open file is as data_rechunk.py writes it: both names, same data, target chunks."""
    if not has_metadata_checksums(file) or not has_own(file, stem) or not has_own(file, f'chunked_{stem}'):
        return False
    dataset = find_dataset(file, f'chunked_{stem}')
    return file[stem] == dataset and dataset.chunks == target_chunks(dataset) and dataset.fletcher32 >= checksums


def has_metadata_checksums(file):
    """Whether the file's own structures have checksums, as in all files written by `create_h5`."""
    return file.id.get_create_plist().get_version()[0] >= 2


# ---- opening and checking

# What h5py raises for files that are damaged or that it cannot deal with.
H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)


def open_h5(path, **options):
    """An HDF5 file opened for reading, with options of h5py.File.

    Raises InputError if it is missing, damaged or being written to.
    """
    require_file(path, 'data_prepare.py makes it')
    try:
        try:
            return h5py.File(path, 'r', **options)
        except BlockingIOError:
            raise InputError(f'{path}: another program has it open for writing; close it there') from None
        except OSError as error:
            if 'unable to lock file' not in str(error):
                raise
            return h5py.File(path, 'r', locking=False, **options)  # a file system without locks
    except H5_ERRORS as error:
        raise InputError(f'{path}: not a sound HDF5 file ({reason(error)}); make it again') from None


@contextmanager
def reading_h5(path):
    """`open_h5` for a `with` block; what h5py raises within the block becomes an InputError."""
    with open_h5(path) as file:
        try:
            yield file
        except H5_ERRORS as error:
            if getattr(error, 'filename', None):  # of another file, which could not be written
                raise
            raise InputError(f'{path}: not a sound HDF5 file ({reason(error)}); make it again') from None


def has_own(file, key):
    """Whether the file itself holds an object `key`, rather than a link to some other place."""
    return key in file.keys() and isinstance(file.get(key, getlink=True), h5py.HardLink)


def find_dataset(file, key):
    """The dataset `key` of an open file: a stem of SHAPES, or that with `chunked_` before it.

    Raises InputError unless it has the shape of SHAPES, holds numbers and stores them in this file.
    """
    path, expected = file.filename, SHAPES[key.removeprefix('chunked_')]
    dataset = file.get(key) if has_own(file, key) else None
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: no dataset '{key}'; it holds {list(file)[:10]}")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{path}: '{key}' takes its values from other files; store them in this one")
    shape = dataset.shape or ()
    fits = len(shape) == len(expected) and all(
        size == want for size, want in zip(shape, expected) if isinstance(want, int)
    )
    if not fits or dataset.dtype.kind not in 'buif':
        wanted = ', '.join(map(str, expected))
        raise InputError(f"{path}: '{key}' is {dataset.dtype} {shape}; expected numbers of shape ({wanted})")
    if len(shape) == 4 and max(shape[1:3]) > LARGEST_SIDE:
        raise InputError(f"{path}: '{key}' is {shape}; the largest image is {LARGEST_SIDE} x {LARGEST_SIDE} pixels")
    if not math.prod(shape):
        raise InputError(f"{path}: '{key}' holds no samples; prepare the data with more images")
    stored = dataset.id.get_storage_size()
    if dataset.size * dataset.dtype.itemsize > LARGEST_RATIO * stored:
        raise InputError(
            f"{path}: '{key}' should hold {len(dataset)} samples and only {stored} bytes are stored; make it again"
        )
    filters = dataset.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code, *_, name = filters.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise InputError(
                f"{path}: '{key}' needs the HDF5 filter {code} ({name.decode(errors='replace')}), which is not "
                'installed; store it with gzip or without compression'
            )
    return dataset


# ---- attributes: text of fixed length
#
# Variable-length text lies in the one part of an HDF5 file without checksums, and damage there can hang HDF5.


def write_text(attributes, name, text):
    """Store a str or a list of str as fixed-length UTF-8."""
    attributes[name] = np.char.encode(text, 'utf-8', 'surrogateescape')


def read_text(attributes, name):
    """A str, a list of str, or None if there is no such text; also of variable length."""
    value = np.asarray(attributes.get(name))
    texts = value.ravel().tolist()
    texts = [each.decode(errors='surrogateescape') if isinstance(each, bytes) else each for each in texts]
    if not texts or not all(isinstance(each, str) for each in texts):
        return None
    return texts if value.ndim else texts[0]


def copy_attributes(source, target):
    """Copy the attributes of an HDF5 object; text becomes of fixed length."""
    for name, value in source.attrs.items():
        text = read_text(source.attrs, name)
        if text is not None and np.asarray(value).dtype.kind in 'OU':
            write_text(target.attrs, name, text)
        else:
            target.attrs[name] = value


# ---- a split's files


class SplitFiles(NamedTuple):
    """What `check_split` finds."""

    tables: dict  # {stem: array} of boxes and labels
    image_size: tuple  # (height, width)
    preparation: str | None  # shared by all files of one run of data_prepare.py
    fingerprints: dict  # {stem: `fingerprint`}


def check_split(folder, needed=()):
    """Check that the files of a split are rechunked, sound and belong together; returns SplitFiles.

    Files in `needed` must be there though they are OPTIONAL. Raises InputError.
    """
    tables, fingerprints, lengths, sizes, preparations = {}, {}, {}, {}, {}
    rechunk = f'run python data_rechunk.py --data {folder.parent}'
    for stem in SHAPES:
        path = folder / f'{stem}.h5'
        if stem in OPTIONAL and stem not in needed and not path.exists():
            continue
        with reading_h5(path) as file:
            if not has_own(file, f'chunked_{stem}'):
                raise InputError(f"{path}: no 'chunked_{stem}'; {rechunk}")
            if not is_rechunked(file, stem):
                raise InputError(f'{path}: not as data_rechunk.py stores it; {rechunk}')
            dataset = find_dataset(file, f'chunked_{stem}')
            check_type(path, dataset)
            fingerprints[stem], lengths[stem] = fingerprint(dataset), len(dataset)
            preparations[stem] = read_text(dataset.attrs, 'preparation')
            if dataset.ndim == 2:
                tables[stem] = dataset[()]
            else:
                sizes[stem] = tuple(map(int, dataset.shape[1:3]))
    for what, values in ('lengths', lengths), ('sizes', sizes), ('preparations', preparations):
        if len(set(values.values())) > 1:
            listed = ', '.join(f'{stem} {value}' for stem, value in values.items())
            raise InputError(
                f'{folder}: the files do not belong together, their {what} differ: {listed}; prepare them again'
            )
    return SplitFiles(tables, sizes['images'], preparations['images'], fingerprints)


def check_type(path, dataset):
    """Raises InputError for images that are not 0 to 255 and masks that are not 0, 1 and 255."""
    dtype = dataset.dtype
    if path.stem == 'images' and dtype.kind == 'f' and dataset[0].max() <= 1:
        raise InputError(f'{path}: the first image has no value above 1; images are expected as 0 to 255')
    if path.stem == 'images' and dtype.kind != 'f' and dtype != np.uint8:
        raise InputError(f'{path}: {dtype}, so some value is not from 0 to 255; mend it and rechunk again')
    if path.stem == 'masks' and dtype != np.uint8:
        raise InputError(f'{path}: {dtype}, so some value is not 0, 1 or 255; mend it and rechunk again')


def read_class_names(path):
    """The list of str in the attribute 'class_names' of breeds.h5; raises InputError if it is not one."""
    with reading_h5(path) as file:
        names = read_text(file['chunked_breeds'].attrs, 'class_names')
    if not are_names(names):
        raise InputError(
            f"{path}: no attribute 'class_names' with the breeds' names, each of 1 to 100 printable characters; "
            'prepare the data again, or train with the species by removing the file'
        )
    return names


# ---- creating


@contextmanager
def create_h5(path):
    """Yield a new h5py.File; raises an OSError that names `path` if it cannot all be written.

    In the format of HDF5 1.10, whose own structures have checksums. Without a chunk cache, because HDF5
    crashes when it writes cached chunks to a full disk while it closes the file.
    """
    try:
        with h5py.File(path, 'w', libver='v110', rdcc_nbytes=0) as file:
            yield file
    except H5_ERRORS as error:
        number = re.search(r'errno = (\d+)', str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


# ---- reading samples


class SampleReader:
    """Reads samples of an image or mask dataset that stores each as one chunk.

    Attributes: `shape` (H, W, C) and `dtype` of a sample as it is read, uint8 or float32.
    """

    def __init__(self, path, key):
        # Without a chunk cache, a chunk goes straight to the array that asks for it.
        self.dataset = open_h5(path, rdcc_nbytes=0)[key]
        self.shape, self.dtype = self.dataset.shape[1:], self.dataset.dtype
        if self.dtype.kind == 'f':
            self.dtype = np.dtype(np.float32)  # HDF5 converts while it reads
        # Made once: for each sample, they cost as much as the reading.
        self.source, self.target = self.dataset.id.get_space(), h5py.h5s.create_simple(self.shape)
        # Without filters (checksums are one) and conversion, the stored chunk is the sample.
        filters = self.dataset.id.get_create_plist().get_nfilters()
        self.as_stored = not filters and self.dtype == self.dataset.dtype

    def read(self, index, out):
        """Read a sample into `out`, a contiguous array of the reader's shape and dtype."""
        if self.as_stored:
            self.dataset.id.read_direct_chunk((index, 0, 0, 0), out=out.reshape(-1).view(np.uint8))
        else:
            self.source.select_hyperslab((index, 0, 0, 0), (1, *self.shape))
            self.dataset.id.read(self.target, self.source, out)


def fingerprint(dataset):
    """What a dataset and its rechunked copies have in common: shape, type and preparation, or else the file."""
    preparation = read_text(dataset.attrs, 'preparation')
    if preparation is None:
        status = os.fstat(dataset.file.id.get_vfd_handle())
        preparation = status.st_dev, status.st_ino, status.st_mtime_ns
    return dataset.shape, dataset.dtype, str(preparation)


# ---- a process for files from elsewhere


def in_own_process(seconds, function, path, *arguments):
    """`function(path, *arguments)`, on Linux in a process of its own with limited CPU time and memory.

    A damaged or hostile file can crash HDF5, keep it busy for ever or make it ask for all memory. Raises
    InputError if that happens, also after `seconds` of CPU time, and what the function raises.
    """
    if sys.platform != 'linux':  # where a process would import everything anew, which takes seconds
        return function(path, *arguments)
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child_main, args=(sender, os.getpid(), seconds, function, path, arguments))
    try:
        with signals_blocked():
            process.start()
        sender.close()
        result = receiver.recv()
    except EOFError:
        process.join()
        how = 'took too long' if process.exitcode == -signal.SIGXCPU else f'ended with {process.exitcode}'
        raise InputError(
            f'{path}: reading it {how}, as damage can cause; it is left as it was; make it again'
        ) from None
    finally:
        if process.pid:
            process.kill()
            process.join()
    if isinstance(result, Exception):
        raise result
    return result


def child_main(sender, parent, seconds, function, path, arguments):
    """What the process does: sends the function's value, or the error it raised."""
    ignore_signals()  # the parent ends it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the parent
    if os.getppid() != parent:
        os._exit(1)
    in_use = 1024 * int(re.search(r'VmData:\s+(\d+)', Path('/proc/self/status').read_text())[1])
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    for kind, value in (
        (resource.RLIMIT_DATA, in_use + (1 << 30) + 3 * size),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))
    try:
        sender.send(function(path, *arguments))
    except (InputError, OSError) as error:
        sender.send(error)
