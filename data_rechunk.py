"""Store every image and mask of the HDF5 splits as one chunk, so that one read fetches one sample.

    python data_rechunk.py                      # the files under datasets/data_new/{train,val,test}
    python data_rechunk.py --data DIR           # the same files under another folder, or those of all folds in it

Takes the files of data_prepare.py or of other programs: any type of number, any chunks, compressed or not.
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
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.child import in_own_process
from support.cli import InputError, run_script
from support.files import lock_folder, replacing, require_file
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

# Samples are read in slabs: of about SLAB_BYTES, which is fastest, or as whole chunks up to LARGEST_SLAB_BYTES.
SLAB_BYTES = 16 << 20
LARGEST_SLAB_BYTES = 128 << 20


class LossyConversion(Exception):
    """A value is another number, or none, in the type it should be stored as."""


def find_slabs(dataset):
    """The slices of samples to read `dataset` in.

    A chunk that spans more samples than a slab may hold is read once for each of its slabs.
    """
    sample_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    rows = dataset.chunks[0] if dataset.chunks else 1
    rows *= max(1, SLAB_BYTES // (rows * sample_bytes))
    rows = max(1, min(rows, LARGEST_SLAB_BYTES // sample_bytes))
    return [slice(start, start + rows) for start in range(0, len(dataset), rows)]


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
    """Whether two arrays of one shape and type hold the same bytes, NaN or not."""
    return one.tobytes() == two.tobytes()


def highest_value(path, images, start):
    """The highest value of `images` (N, H, W, 3); `start` is the number of the first of them.

    Raises InputError for values outside 0 to 255.
    """
    for number, image in enumerate(images, start):
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 255):
            value = high if low >= 0 else low
            raise InputError(f'{path}: sample {number} holds {value:g}; images are expected as 0 to 255')
    return images.max()


def count_mask_values(path, masks, start):
    """How many pixels of each of `masks` (N, H, W, 1) are 0, 1 and 255: (N, 3); `start` is the number of the first.

    Raises InputError for other values.
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
    """Write `values` to a part of a dataset; raises OSError if other values are read back."""
    target[part] = values
    if not same_bytes(values, target[part]):
        raise OSError(errno.EIO, 'what was read back differs from what was written', target.file.filename)


def copy_rechunked(source, stem, new_path, dtype, checksums):
    """Write the dataset `source` to a new file, as `dtype` and in `target_chunks`, with what else its file holds.

    With masks goes a new KNOWN_MASKS. Raises LossyConversion, InputError for values that images or masks do not
    have, and OSError for a failed write.
    """
    path, highest, counts = source.file.filename, [], []
    with create_h5(new_path) as file:
        target = file.create_dataset(stem, source.shape, dtype, chunks=target_chunks(source), fletcher32=checksums)
        file[f'chunked_{stem}'] = target  # the name that the original's data loader asks for
        title = '/'.join(Path(path).parts[-2:])
        for part in tqdm(find_slabs(source), desc=title, unit='slab', leave=False, disable=None):
            slab = source[part]
            if stem == 'masks':
                counts.append(count_mask_values(path, slab, part.start))
            slab = convert(slab, target.dtype)
            if stem == 'images':
                highest.append(highest_value(path, slab, part.start))
            write_compared(target, part, slab)
        if stem == 'images' and max(highest) <= 1:
            raise InputError(f'{path}: no value is above 1; images are expected as 0 to 255')
        if stem == 'masks':
            known_masks = find_known_masks(path, np.concatenate(counts))
            record = file.create_dataset(KNOWN_MASKS, known_masks.shape, np.uint8, fletcher32=True)
            write_compared(record, np.s_[:], known_masks)
        copy_attributes(source, target)
        copy_attributes(source.file, file)
        for name in source.file:
            if name not in file:
                if has_own(source.file, name):
                    source.file.copy(name, file)
                else:
                    file[name] = source.file.get(name, getlink=True)


def needs_rechunking(path, checksums):
    """Whether the file is not yet as `rechunk_file` leaves it."""
    with reading_h5(path) as file:
        return not is_rechunked(file, path.stem, checksums)


def write_rechunked(path, new_path, checksums):
    """Write the file at `path` rechunked to `new_path`; returns the number of samples."""
    stem, chunked = path.stem, f'chunked_{path.stem}'
    with reading_h5(path) as file:
        # A file may hold nothing but the original's `chunked_` copy.
        source = find_dataset(file, chunked if chunked in file and stem not in file else stem)
        try:
            copy_rechunked(source, stem, new_path, np.uint8 if source.ndim == 4 else source.dtype, checksums)
        except LossyConversion:
            copy_rechunked(source, stem, new_path, source.dtype, checksums)
        return len(source)


def rechunk_file(path, force=False, checksums=False):
    """Rechunk one file, named after its dataset; returns the number of samples, None if there was nothing to do.

    Masks become uint8. Images do if all values are whole numbers, and keep their type otherwise. Raises InputError
    for a file that is damaged or of another shape, for images with values outside 0 to 255 or none above 1, and for
    masks of other values than 0, 1 and 255.
    """
    path = Path(path)
    seconds = 60 + path.stat().st_size // 10**6  # of CPU time; a valid file takes far less than a second per MB
    if not force and not in_own_process(seconds, needs_rechunking, path, checksums):
        return None
    with lock_folder(path.resolve().parent), replacing(path) as new_path:
        return in_own_process(seconds, write_rechunked, path, new_path, checksums)


def rechunk(root, force=False, checksums=False):
    """Rechunk every file of every split under `root`, or under the folds in it, and print a line for each."""
    roots = [Path(root), *sorted(Path(root).glob('fold[0-9]*'))]
    folders = [folder / split for folder in roots for split in SPLITS if (folder / split).is_dir()]
    if not folders:
        raise InputError(f'{root}: no folder train, val or test in it; data_prepare.py makes them')
    for path in [folder / f'{stem}.h5' for folder in folders for stem in SHAPES]:
        if path.stem in OPTIONAL and not path.exists():
            continue
        require_file(path, 'data_prepare.py makes it')
        start, before = time.perf_counter(), path.stat().st_size
        count = rechunk_file(path, force, checksums)
        if count is None:
            print(f'{path}: already rechunked, nothing to do')
        else:
            sizes = f'{before / 1e6:.1f} MB -> {path.stat().st_size / 1e6:.1f} MB'
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
