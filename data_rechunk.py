"""Store every image and mask of the HDF5 splits as one chunk, so that one read fetches one sample.

    python data_rechunk.py                      # the files under datasets/data_new/{train,val,test}
    python data_rechunk.py --data DIR           # the same files under another folder, or those of all folds in it

Afterwards `images.h5` holds `chunked_images` beside `images`, `masks.h5` holds `chunked_masks`, and so on:
two names of the same data, stored once. `masks.h5` also holds `known_masks`, which of the masks have a known
pixel, so that training need not read them all to find out. Expect a few seconds per gigabyte and a line per
file. A second run finds nothing to do.

A file is never changed in place: the new one is written beside it, read back, compared and renamed, so a
killed run leaves the old file whole. On Linux each file is read in a process of its own, because a damaged
one can crash HDF5 or keep it busy for ever.
"""

import argparse
import errno
import math
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.child import in_own_process
from support.cli import InputError, run_script
from support.files import lock_folder, replacing
from support.hdf5 import (
    KNOWN_MASKS,
    MASK_UNKNOWN,
    OPTIONAL,
    SHAPES,
    SPLITS,
    copy_attributes,
    create_h5,
    find_dataset,
    has_own,
    is_rechunked,
    reading_h5,
    target_chunks,
)

# Images are read in slabs: of about SLAB_BYTES, as whole chunks where those fit in LARGEST_SLAB_BYTES.
SLAB_BYTES = 16 << 20
LARGEST_SLAB_BYTES = 128 << 20


class LossyConversion(Exception):
    """A value is another number, or none, in the type it should be stored as."""


def slab_starts(dataset):
    """The range of the first samples of the slabs to read `dataset` in; its step is the samples in a slab.

    A chunk that spans more samples than a slab may hold is read once for each of its slabs.
    """
    sample_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    step = dataset.chunks[0] if dataset.chunks else 1
    step *= max(1, SLAB_BYTES // (step * sample_bytes))
    return range(0, len(dataset), max(1, min(step, LARGEST_SLAB_BYTES // sample_bytes)))


def convert(values, dtype):
    """`values` (N, ...) as `dtype`; raises LossyConversion unless every number stays the same."""
    if values.dtype == dtype:
        return values
    result = np.empty(values.shape, dtype)
    with np.errstate(invalid='ignore'):
        for source, target in zip(values, result):  # a sample at a time keeps the temporaries small
            target[...] = source
            if not np.array_equal(source, target):
                raise LossyConversion
    return result


def same_bytes(one, two):
    """Whether two contiguous arrays of one shape and type hold the same bytes, NaN or not."""
    word = np.uint8 if one.nbytes % 8 else np.uint64  # numpy compares words 14 times as fast as bytes
    return np.array_equal(one.reshape(-1).view(word), two.reshape(-1).view(word))


def check_range(path, images, start):
    """Raises InputError for values outside 0 to 255; `start` is the number of the first image of `images`."""
    for number, image in enumerate(images, start):
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 255):
            value = high if low >= 0 else low
            raise InputError(f'{path}: sample {number} holds {value:g}; images are expected as 0 to 255')


def count_mask_values(path, masks, start):
    """How many pixels of each of `masks` (N, H, W, 1), of any type, are 0, 1 and 255: (N, 3).

    Raises InputError for other values; `start` is the number of the first mask of `masks`.
    """
    allowed = 0, 1, MASK_UNKNOWN
    counts = np.array([[np.count_nonzero(mask == value) for value in allowed] for mask in masks])
    wrong = np.flatnonzero(counts.sum(axis=1) < masks[0].size)
    if len(wrong):
        mask = masks[wrong[0]]
        value = mask[~np.isin(mask, allowed)][0]
        raise InputError(
            f'{path}: sample {start + wrong[0]} holds {value:g}; a mask holds 0, 1 and {MASK_UNKNOWN} for unknown'
        )
    return counts


def find_known_masks(path, counts):
    """(N,) uint8, what KNOWN_MASKS holds, from the `count_mask_values` (N, 3) of all masks.

    Raises InputError for masks of 0 and 255.
    """
    background, pet, unknown = counts.sum(axis=0)
    if unknown and background and not pet:
        raise InputError(f'{path}: holds 0 and {MASK_UNKNOWN} but no 1; {MASK_UNKNOWN} means unknown, the pet is 1')
    return counts[:, :2].any(axis=1).astype(np.uint8)


def write_compared(target, part, values):
    """Write the contiguous `values` to a part of a dataset; raises OSError if other values are read back."""
    target[part] = values
    if not same_bytes(values, target[part]):
        raise OSError(errno.EIO, 'what was read back differs from what was written', target.file.filename)


def copy_rechunked(source, path, dtype, checksums):
    """Copy a dataset and what else its file holds to a new file, as `dtype` and in `target_chunks`.

    With masks goes a new KNOWN_MASKS. What is written is read back and compared. Raises LossyConversion, InputError
    for values that images or masks do not have, and OSError for a failed write.
    """
    stem = source.name.strip('/').removeprefix('chunked_')
    source_path, counts = source.file.filename, []
    with create_h5(path) as file:
        target = file.create_dataset(stem, source.shape, dtype, chunks=target_chunks(source), fletcher32=checksums)
        file[f'chunked_{stem}'] = target  # the name that the study's data loader asks for
        if stem == 'masks':
            shape = source.shape[:1]
            known_masks = file.create_dataset(KNOWN_MASKS, shape, np.uint8, chunks=shape, fletcher32=True)
        copy_attributes(source, target)
        copy_attributes(source.file, file)
        for name in source.file:
            if name not in file:  # whatever else the file holds goes along
                if has_own(source.file, name):
                    source.file.copy(name, file)
                else:
                    file[name] = source.file.get(name, getlink=True)
        starts = slab_starts(source)
        title = '/'.join(Path(source_path).parts[-2:])
        for start in tqdm(starts, desc=title, unit='slab', leave=False, disable=None):
            part = slice(start, start + starts.step)
            slab = source[part]
            if stem == 'masks':
                counts.append(count_mask_values(source_path, slab, start))
            slab = np.ascontiguousarray(convert(slab, target.dtype))
            if stem == 'images' and slab.dtype != np.uint8:
                check_range(source_path, slab, start)
            write_compared(target, part, slab)
        if stem == 'masks':
            write_compared(known_masks, np.s_[:], find_known_masks(source_path, np.concatenate(counts)))


def find_source(file, stem):
    """The dataset to rechunk; a file may hold nothing but the study's `chunked_` copy."""
    return find_dataset(file, f'chunked_{stem}' if f'chunked_{stem}' in file and stem not in file else stem)


def needs_rechunking(path, checksums):
    """Whether the file is not yet as `rechunk_file` leaves it; raises InputError if it cannot be rechunked."""
    with reading_h5(path) as file:
        find_source(file, path.stem)
        return not is_rechunked(file, path.stem, checksums)


def write_rechunked(path, new_path, checksums):
    """Write the file at `path` rechunked to `new_path`; returns the number of samples."""
    with reading_h5(path) as file:
        source = find_source(file, path.stem)
        try:
            compact = np.dtype(np.uint8) if source.ndim == 4 else source.dtype
            copy_rechunked(source, new_path, compact, checksums)
        except LossyConversion:
            copy_rechunked(source, new_path, source.dtype, checksums)
        return len(source)


def rechunk_file(path, force=False, checksums=False):
    """Rechunk one file, named after its dataset; returns the number of samples, None if there was nothing to do.

    Masks become uint8. Images do if all values are whole and from 0 to 255, and keep their type otherwise. Raises
    InputError for a file that is missing, damaged or of another shape, and for masks of other values than 0, 1
    and 255.
    """
    path = Path(path)
    seconds = 60 + size_of(path) // 10**6  # of CPU time; a valid file takes far less than a second per MB
    if not in_own_process(seconds, needs_rechunking, path, checksums) and not force:
        return None
    with lock_folder(os.path.dirname(os.path.realpath(path))), replacing(path) as new_path:
        return in_own_process(seconds, write_rechunked, path, new_path, checksums)


def size_of(path):
    """Bytes of the file, 0 if there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def rechunk(root, force=False, checksums=False):
    """Rechunk every file of every split under `root`, or under the folds in it, and print a line for each."""
    roots = [Path(root), *sorted(Path(root).glob('fold[0-9]*'))]
    folders = [each / split for each in roots for split in SPLITS if (each / split).is_dir()]
    if not folders:
        raise InputError(f'{root}: no folder train, val or test in it; data_prepare.py makes them')
    for folder in folders:
        for stem in SHAPES:
            path = folder / f'{stem}.h5'
            if stem in OPTIONAL and not path.exists():
                continue
            before, start = size_of(path), time.perf_counter()
            count = rechunk_file(path, force, checksums)
            if count is None:
                print(f'{path}: already rechunked, nothing to do')
            else:
                sizes = f'{before / 1e6:.1f} MB -> {size_of(path) / 1e6:.1f} MB'
                print(f'{path}: {count} samples, {sizes}, {time.perf_counter() - start:.1f} s')


def main(argv=None):
    parser = argparse.ArgumentParser(description='Store every image and mask of the HDF5 splits as one chunk.')
    add = parser.add_argument
    add('--data', default='datasets/data_new', metavar='DIR', help='folder of the splits (default: %(default)s)')
    add('--force', action='store_true', help='rechunk finished files again')
    add('--checksums', action='store_true', help='store a checksum with each chunk: slower, and reading finds damage')
    args = parser.parse_args(argv)
    rechunk(args.data, args.force, args.checksums)


if __name__ == '__main__':
    run_script(main)
