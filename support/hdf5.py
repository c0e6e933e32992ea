"""HDF5 files: their schema, opening, checking, creating, and reading a sample. Imports no torch.

Each file holds one dataset with the file's name, as in the original: `images.h5` holds `images`. `data_rechunk.py`
adds `chunked_images`, a second name of the same data.
"""

import math
import os
import re
from contextlib import contextmanager

import h5py
import numpy as np

from support.cli import InputError, reason
from support.files import require_file

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
KNOWN_MASKS = 'known_masks'  # dataset of a rechunked masks.h5, (N,) uint8: 1 if any pixel of the mask is known

LARGEST_SIDE = 4096  # pixels of an image's height or width
LARGEST_RATIO = 1100  # of a dataset's size to its file's; gzip's best is 1032


def is_image_size(*sides):
    """Whether the networks take images with these sides in pixels."""
    return all(64 <= side <= LARGEST_SIDE and side % 16 == 0 for side in sides)


def target_chunks(dataset):
    """The chunk shape after rechunking: an image or a mask each, a table of labels as a whole.

    A box is 16 bytes and a label 1 or 2; in chunks of their own, each would cost a read and an index entry.
    """
    return (1, *dataset.shape[1:]) if dataset.ndim == 4 else dataset.shape


def is_rechunked(file, stem, checksums=False):
    """Whether an open file is as data_rechunk.py writes it: both names, same data, target chunks, known masks."""
    if not has_metadata_checksums(file) or not has_own(file, stem) or not has_own(file, f'chunked_{stem}'):
        return False
    dataset = find_dataset(file, f'chunked_{stem}')
    if stem == 'images' and dataset.dtype != np.uint8 and dataset.dtype.kind != 'f':
        return False
    if stem == 'masks' and (dataset.dtype != np.uint8 or read_known_masks(file, len(dataset)) is None):
        return False
    if checksums and not dataset.fletcher32:
        return False
    return file[stem] == dataset and dataset.chunks == target_chunks(dataset)


def read_known_masks(file, count):
    """(N,) bool: which of the `count` masks of an open file are known; None without such a record."""
    record = file[KNOWN_MASKS] if has_own(file, KNOWN_MASKS) else None
    if not isinstance(record, h5py.Dataset) or record.shape != (count,) or record.dtype != np.uint8:
        return None
    return record[()] == 1


def has_metadata_checksums(file):
    """Whether the file's own structures have checksums, as in all files written by `create_h5`."""
    return file.id.get_create_plist().get_version()[0] >= 2


# ---- opening and checking

# What h5py raises for files that are damaged or that it cannot deal with.
H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)


def open_h5(path, **options):
    """An h5py.File for reading, also on a file system without locks; `options` of h5py.File."""
    try:
        return h5py.File(path, 'r', **options)
    except OSError as error:
        if isinstance(error, BlockingIOError) or 'unable to lock file' not in str(error):
            raise
        return h5py.File(path, 'r', locking=False, **options)


@contextmanager
def reading_h5(path):
    """`open_h5` for a `with` block; raises InputError for a file that is missing, damaged or being written to.

    What h5py raises within the block becomes an InputError, too.
    """
    require_file(path, 'data_prepare.py makes it')
    try:
        with open_h5(path) as file:
            yield file
    except BlockingIOError:
        raise InputError(f'{path}: another program has it open for writing; close it there') from None
    except H5_ERRORS as error:
        if getattr(error, 'filename', None):  # of another file, which could not be written
            raise
        raise InputError(f'{path}: not a valid HDF5 file ({reason(error)}); make it again') from None


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
        raise InputError(f"{path}: no dataset '{key}' of its own (links do not count); it holds {list(file)[:10]}")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{path}: '{key}' takes its values from other files; store them in this one")
    shape = dataset.shape or ()
    if len(shape) != len(expected) or shape[-1] != expected[-1] or dataset.dtype.kind not in 'buif':
        wanted = ', '.join(map(str, expected))
        raise InputError(f"{path}: '{key}' is {dataset.dtype} {shape}; expected numbers of shape ({wanted})")
    if not math.prod(shape):
        raise InputError(f"{path}: '{key}' holds no samples; prepare the data with more images")
    stored = file.id.get_filesize()  # the dataset's own get_storage_size() visits every chunk
    if dataset.size * dataset.dtype.itemsize > LARGEST_RATIO * stored:
        raise InputError(f"{path}: '{key}' has {len(dataset)} samples in a file of {stored} bytes; make it again")
    filters = dataset.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code, *_, name = filters.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise InputError(
                f"{path}: '{key}' needs the HDF5 filter {code} ({name.decode(errors='replace')}), which is not "
                'installed; store it with gzip or without compression'
            )
    return dataset


def find_rechunked(file, path):
    """The dataset of a file that was opened at `path`; raises InputError unless data_rechunk.py wrote it."""
    if not is_rechunked(file, path.stem):
        raise InputError(
            f'{path}: not as data_rechunk.py stores it; run python data_rechunk.py --data {path.parent.parent}'
        )
    return find_dataset(file, f'chunked_{path.stem}')


# ---- attributes: text of fixed length
#
# Variable-length text lies in the one part of an HDF5 file without checksums, and damage there can hang HDF5.


def write_text(attributes, name, text):
    """Store a str or a list of str as fixed-length UTF-8."""
    attributes[name] = np.char.encode(text, 'utf-8', 'surrogateescape')


def read_text(attributes, name):
    """A str, a list of str, or None if there is no such text; also of variable length."""
    value = np.asarray(attributes.get(name))
    texts = [text.decode(errors='surrogateescape') if isinstance(text, bytes) else text for text in value.flat]
    if not texts or not all(isinstance(text, str) for text in texts):
        return None
    return texts if value.ndim else texts[0]


def copy_attributes(source, target):
    """Copy the attributes of an HDF5 object; text becomes of fixed length."""
    for name, value in source.attrs.items():
        text = read_text(source.attrs, name)
        if text is None:
            target.attrs[name] = value
        else:
            write_text(target.attrs, name, text)


# ---- creating


@contextmanager
def create_h5(path):
    """Yield a new h5py.File; raises an OSError that names `path` if it cannot all be written.

    In the format of HDF5 1.10, whose own structures have checksums. Without buffers for values, because HDF5 crashes
    when it writes them to a full disk while it closes a dataset. Without a lock, which some file systems do not
    have: nobody else knows the new file.
    """
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_LATEST)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)  # as h5py.File does
    access.set_cache(0, 1, 0, 0)  # of chunks
    access.set_sieve_buf_size(0)  # of datasets without chunks
    access.set_file_locking(False, False)
    try:
        with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)) as file:
            yield file
    except H5_ERRORS as error:
        number = re.search(r'errno = (\d+)', str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


# ---- reading samples


class SampleReader:
    """Reads samples of a rechunked images.h5 or masks.h5.

    Attributes: `shape` (H, W, C) and `dtype` of a sample as it is read, uint8 or float32.
    """

    def __init__(self, path):
        # Without a chunk cache, a chunk goes straight to the array that asks for it.
        self.path, self.dataset = path, open_h5(path, rdcc_nbytes=0)[f'chunked_{path.stem}']
        self.shape = self.dataset.shape[1:]
        self.dtype = np.dtype(np.float32 if self.dataset.dtype.kind == 'f' else np.uint8)
        # Without filters (checksums are one) and conversion, the stored chunk is the sample.
        filters = self.dataset.id.get_create_plist().get_nfilters()
        self.as_stored = not filters and self.dtype == self.dataset.dtype

    def read(self, index, out):
        """Read a sample into `out`, a contiguous array of the reader's shape and dtype."""
        try:
            if self.as_stored:
                self.dataset.id.read_direct_chunk((index, 0, 0, 0), out=out.reshape(-1).view(np.uint8))
            else:
                self.dataset.read_direct(out, index)  # HDF5 converts
        except H5_ERRORS as error:
            raise InputError(f'{self.path}: sample {index} is damaged ({reason(error)}); make the file again') from None


def fingerprint(dataset):
    """Identifies the data, whether rechunked or not: shape, type and `preparation`, or else the file's inode."""
    preparation = read_text(dataset.attrs, 'preparation')
    if preparation is None:
        status = os.fstat(dataset.file.id.get_vfd_handle())
        preparation = status.st_dev, status.st_ino, status.st_mtime_ns
    return dataset.shape, dataset.dtype, str(preparation)
