"""Store every image and mask of the HDF5 splits as one chunk, so that one read fetches one sample.

    python data_rechunk.py                      # the files under datasets/data_new/{train,val,test}
    python data_rechunk.py --data DIR           # the same files under another folder

Afterwards `images.h5` holds `chunked_images` beside `images`, `masks.h5` holds `chunked_masks`, and
so on. The two names are hard links to the same stored data, so nothing is stored twice. Expect a few
seconds a gigabyte and a line for each file; a second run finds nothing to do and returns at once.

A file is never changed in place: the new one is written beside it, read back, compared and then
renamed over it. A run killed at any moment leaves the old file whole, and the next run finishes.

Memory: three slabs of 16 MiB at most and one chunk of the source, whatever the number of samples.

It also holds what the scripts share and that needs no torch: what the files look like, how they are
opened and replaced, `InputError`, `run_script` and `whole_number`.
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

SPLITS = ('train', 'val', 'test')

# Shape of each file's dataset; N is the number of samples, H and W the size of the stored images.
SHAPES = {
    'images': ('N', 'H', 'W', 3),
    'masks': ('N', 'H', 'W', 1),
    'bboxes': ('N', 4),
    'binary': ('N', 1),
    'breeds': ('N', 1),
}
OPTIONAL = ('breeds',)  # the coursework's copies of the data have no breeds

MASK_UNKNOWN = 255  # stored in a mask where it is not known whether a pixel shows the pet

SLAB_BYTES = 16 << 20  # samples held in memory at a time; more is slower, for the processor's cache


class InputError(Exception):
    """A file or an option that cannot be used; the message is the one line that the user sees."""


def run_script(main):
    """Call `main()`; turn bad input into one line on standard error and exit status 1."""
    try:
        main()
    except InputError as error:
        # What a loader's worker raises arrives with the worker's traceback before it.
        sys.exit(f'error: {str(error).strip().rpartition("InputError: ")[2]}')
    except OSError as error:
        what = f'{error.filename}: {error.strerror}' if error.filename else reason(error)
        sys.exit(f'error: {what}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def whole_number(minimum):
    """An argparse type: a whole number of at least `minimum` that fits a random seed's 32 bits."""
    def parse(text):
        if not text.lstrip('+-').isdecimal() or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {minimum} up")
        return int(text)
    return parse


def reason(error):
    """The exception's message as one line."""
    text = getattr(error, 'strerror', None) or str(error)
    return ' '.join(text.split()) or type(error).__name__


@contextmanager
def replacing(path):
    """Yield a path beside `path` to write to; when the block ends well it takes the place of `path`.

    The new file is synced to disk before it is renamed, so `path` is the old file or the new one at
    every moment. If the block raises, the unfinished file is removed and `path` is untouched.
    """
    if os.path.isdir(path):
        raise InputError(f'{path}: is a folder; expected the name of a file to write')
    path = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    try:
        yield part
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == 'posix':
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def open_h5(path, **options):
    """Open an HDF5 file for reading, with options of h5py.File.

    Raises InputError where there is none or it is damaged.
    """
    if not os.path.isfile(path):
        found = 'is a folder' if os.path.isdir(path) else 'no such file'
        raise InputError(f'{path}: {found}; data_prepare.py makes it')
    try:
        return h5py.File(path, 'r', **options)
    except OSError as error:
        raise InputError(f'{path}: not a sound HDF5 file ({reason(error)}); make it again') from None


def find_dataset(file, key):
    """The dataset `key` of an open file, its shape and type checked against SHAPES.

    `key` is a stem of SHAPES or that stem with `chunked_` before it.
    """
    path, expected = file.filename, SHAPES[key.removeprefix('chunked_')]
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: no dataset '{key}'; it holds {sorted(file)}")
    shape = dataset.shape or ()
    fits = len(shape) == len(expected) and all(
        size == want for size, want in zip(shape, expected) if isinstance(want, int)
    )
    if not fits or dataset.dtype.kind not in 'buif':
        wanted = ', '.join(map(str, expected))
        raise InputError(
            f"{path}: '{key}' is {dataset.dtype} {shape}; expected numbers of shape ({wanted})"
        )
    if not math.prod(shape):
        raise InputError(f"{path}: '{key}' holds no samples; prepare the data with more photographs")
    return dataset


def source_slabs(source, dtype, scratch_folder):
    """Yield the samples of a 4-D dataset in order as `dtype` arrays (n, H, W, C) of bounded size.

    Every stored chunk is read once. Where the chunks span so many images that those do not fit in
    SLAB_BYTES, the blocks are read chunk by chunk to a scratch file and put together from there.
    Raises LossyConversion where a value is not the same number as `dtype`.
    """
    count, *sample = source.shape
    chunk = source.chunks or (1, *sample)
    bytes_in, bytes_out = (math.prod(sample) * kind.itemsize for kind in (source.dtype, dtype))
    rows = chunk[0] * max(1, SLAB_BYTES // (chunk[0] * bytes_in))
    for start in range(0, count, rows):
        n = min(rows, count - start)
        # The largest block of whole chunks, as wide as the image where possible, that fits.
        block = list(sample)
        for axis in range(3):
            step = chunk[axis + 1]
            slice_bytes = n * math.prod(block) // block[axis] * source.dtype.itemsize
            block[axis] = min(block[axis], max(1, SLAB_BYTES // slice_bytes // step) * step)
        boxes = [
            tuple(slice(i, min(i + step, size)) for i, step, size in zip(corner, block, sample))
            for corner in itertools.product(*(range(0, s, b) for s, b in zip(sample, block)))
        ]
        blocks = (convert(source[(slice(start, start + n), *box)], dtype) for box in boxes)
        if len(boxes) == 1:
            yield from blocks
        elif n * bytes_out <= SLAB_BYTES:
            slab = np.empty((n, *sample), dtype)
            for box, values in zip(boxes, blocks):
                slab[(slice(None), *box)] = values
            yield slab
        else:
            yield from through_scratch(boxes, blocks, n, sample, dtype, scratch_folder)


def through_scratch(boxes, blocks, n, sample, dtype, folder):
    """Yield slabs of `n` samples whose `blocks` (n, h, w, c) arrive one box of the image at a time."""
    rows = max(1, SLAB_BYTES // (math.prod(sample) * dtype.itemsize))
    with tempfile.TemporaryFile(dir=folder) as scratch:
        offsets, sizes = [], []
        for values in blocks:
            offsets.append(scratch.tell())
            sizes.append(values[0].nbytes)
            scratch.write(np.ascontiguousarray(values))
        for start in range(0, n, rows):
            slab = np.empty((min(rows, n - start), *sample), dtype)
            for box, offset, size in zip(boxes, offsets, sizes):
                scratch.seek(offset + start * size)
                values = np.frombuffer(scratch.read(len(slab) * size), dtype)
                slab[(slice(None), *box)] = values.reshape(slab[(slice(None), *box)].shape)
            yield slab


class LossyConversion(Exception):
    """A value is another number, or none, in the type it should be stored as."""


def convert(values, dtype):
    """`values` as `dtype`; raises LossyConversion unless every number stays what it was."""
    if values.dtype == dtype:
        return values
    result = np.empty(values.shape, dtype)
    with np.errstate(invalid='ignore'):
        for source, target in zip(values, result):  # a sample at a time keeps the temporaries small
            target[...] = source
            if not np.array_equal(source, target):
                raise LossyConversion
    return result


def write_chunked(source, target_path, dtype, checksums):
    """Copy `source` to a new file at `target_path`, one sample a chunk, and compare what it then holds."""
    stem = source.name.strip('/').removeprefix('chunked_')
    # Without a chunk cache, chunks go straight to the file, and reading them back reads the file.
    with h5py.File(target_path, 'w', libver='v110', rdcc_nbytes=0) as file:
        target = file.create_dataset(stem, source.shape, dtype, chunks=target_chunks(source),
                                     fletcher32=checksums)
        # The second name for the same data, which the original's data loader asks for.
        file[f'chunked_{stem}'] = target
        for key, value in source.attrs.items():
            target.attrs[key] = value
        for key in source.file:
            if key not in file:  # whatever else the file holds goes along unchanged
                source.file.copy(key, file)
        if source.ndim == 2:
            write_compared(target, 0, source[()])
            return
        start = 0
        name = '/'.join(Path(source.file.filename).parts[-2:])
        with tqdm(total=len(source), desc=name, unit='image', leave=False, disable=None) as bar:
            for slab in source_slabs(source, target.dtype, Path(target_path).parent):
                write_compared(target, start, slab)
                start += len(slab)
                bar.update(len(slab))


def write_compared(target, start, values):
    """Write `values` to the samples from `start` on; raises OSError if they read back differently."""
    rows = slice(start, start + len(values))
    target[rows] = values
    if not same_bytes(np.ascontiguousarray(values), target[rows]):
        raise OSError('what was read back differs from what was written')


def same_bytes(one, two):
    """Whether two contiguous arrays of one shape and type hold the same bytes, NaN or not."""
    one, two = one.reshape(-1).view(np.uint8), two.reshape(-1).view(np.uint8)
    whole = len(one) // 8 * 8  # numpy compares words twenty times as fast as bytes
    words_equal = np.array_equal(one[:whole].view(np.uint64), two[:whole].view(np.uint64))
    return words_equal and np.array_equal(one[whole:], two[whole:])


def target_chunks(source):
    """One sample a chunk for images and masks; one chunk for a whole label table.

    A box is 16 bytes and a label 1 or 2: as chunks of their own, each would carry an index entry
    larger than itself and cost a read of its own, where the whole table takes a single read.
    """
    return (1, *source.shape[1:]) if source.ndim == 4 else source.shape


def is_rechunked(file, stem, checksums):
    """True if the open file already has both names on the same data in the target layout."""
    if stem not in file or f'chunked_{stem}' not in file or file[stem] != file[f'chunked_{stem}']:
        return False
    dataset = find_dataset(file, f'chunked_{stem}')
    return dataset.chunks == target_chunks(dataset) and dataset.fletcher32 >= checksums


def rechunk_file(path, force=False, checksums=False):
    """Rechunk one file, named after its dataset; return the number of samples, None if it was done.

    Numbers of another type in images and masks become uint8 if all are whole and from 0 to 255; each
    value is compared as it is read, and at the first that differs the stored type is kept instead.
    """
    path = Path(path)
    stem = path.stem
    with open_h5(path) as file:
        # A file may hold nothing but the original's `chunked_` copy.
        key = stem if stem in file else f'chunked_{stem}'
        source = find_dataset(file, key)
        count, stored = len(source), source.dtype
        if is_rechunked(file, stem, checksums) and not force:
            return None
    compact = np.dtype(np.uint8) if len(SHAPES[stem]) == 4 else stored
    with replacing(path) as part:
        try:
            with open_h5(path) as file:
                try:
                    write_chunked(file[key], part, compact, checksums)
                except LossyConversion:
                    write_chunked(file[key], part, stored, checksums)
        except OSError as error:
            raise InputError(f'{path}: not rechunked and left as it was ({reason(error)})') from None
    return count


def rechunk(root, force=False, checksums=False):
    """Rechunk every file of every split under `root` and print a line for each."""
    root = Path(root)
    splits = [root / split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise InputError(f'{root}: no folder train, val or test in it; data_prepare.py makes them')
    for folder in splits:
        for stem in SHAPES:
            path = folder / f'{stem}.h5'
            if stem in OPTIONAL and not path.exists():
                continue
            before, start = path.stat().st_size if path.exists() else 0, time.perf_counter()
            count = rechunk_file(path, force, checksums)
            if count is None:
                print(f'{path}: already rechunked, nothing to do')
                continue
            sizes = f'{before / 1e6:.1f} MB -> {path.stat().st_size / 1e6:.1f} MB'
            print(f'{path}: {count} samples, {sizes}, {time.perf_counter() - start:.1f} s')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Store every image and mask of the HDF5 splits as one chunk.'
    )
    parser.add_argument('--data', default='datasets/data_new', metavar='DIR',
                        help='folder with train/, val/ and test/ (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='rechunk finished files again')
    parser.add_argument('--checksums', action='store_true',
                        help='store a checksum with each chunk (fletcher32): damage is noticed when it is '
                             'read, and reading takes longer')
    args = parser.parse_args(argv)
    rechunk(args.data, args.force, args.checksums)


if __name__ == '__main__':
    run_script(main)
