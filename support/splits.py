"""The files of a split: whether they are rechunked and belong together, and the values of their labels.

Which masks are known is read from what data_rechunk.py recorded, so a split of any size is opened at once.
Imports no torch.
"""

from typing import NamedTuple

import numpy as np

from support.cli import InputError, are_names
from support.hdf5 import (
    OPTIONAL,
    SHAPES,
    find_dataset,
    fingerprint,
    has_own,
    is_rechunked,
    read_known_masks,
    read_text,
    reading_h5,
)

SPECIES = ('cat', 'dog')


class Split(NamedTuple):
    """What `open_split` finds; N is the number of samples."""

    image_size: tuple  # (height, width)
    preparation: str | None  # shared by all files of one run of data_prepare.py
    fingerprints: dict  # {stem: `hdf5.fingerprint`}
    class_names: list  # of str, the name of each label
    class_species: list  # of str, 'cat' or 'dog' for each label; None if its samples are of none or both
    labels: np.ndarray  # (N,) int64, -1 unknown
    bboxes: np.ndarray  # (N, 4) float32: xmin, ymin, xmax, ymax in pixels, NaN unknown
    has_mask: np.ndarray  # (N,) bool: whether any pixel of the mask is known


def open_split(folder, label):
    """The Split in a folder; `label` as for MTLDataset. Raises InputError for files that cannot be used."""
    paths = {stem: folder / f'{stem}.h5' for stem in SHAPES}
    files = {}
    for stem, path in paths.items():
        if stem not in OPTIONAL or label == 'breed' or path.exists():
            files[stem] = read_split_file(path)
    check_same(folder, 'lengths', {stem: file.length for stem, file in files.items()})
    check_same(folder, 'sizes', {stem: files[stem].size for stem in ('images', 'masks')})
    check_same(folder, 'preparations', {stem: file.preparation for stem, file in files.items()})
    species = check_labels(paths['binary'], files['binary'].table, len(SPECIES))
    labels, class_names = species, list(SPECIES)
    if 'breeds' in files and label != 'species':
        class_names = check_class_names(paths['breeds'], files['breeds'].class_names)
        labels = check_labels(paths['breeds'], files['breeds'].table, len(class_names))
    size = files['images'].size
    return Split(
        image_size=size,
        preparation=files['images'].preparation,
        fingerprints={stem: file.fingerprint for stem, file in files.items()},
        class_names=class_names,
        class_species=[find_species(species[labels == label]) for label in range(len(class_names))],
        labels=labels,
        bboxes=check_boxes(paths['bboxes'], files['bboxes'].table, *size),
        has_mask=files['masks'].known_masks,
    )


def find_species(numbers):
    """The one of SPECIES that all known `numbers` stand for, else None."""
    known = set(numbers[numbers >= 0].tolist())
    return SPECIES[known.pop()] if len(known) == 1 else None


class SplitFile(NamedTuple):
    """What `read_split_file` finds."""

    length: int  # number of samples
    size: tuple | None  # (height, width) of images and masks
    preparation: str | None
    fingerprint: tuple
    table: np.ndarray | None  # boxes or labels as they are stored
    class_names: list | None  # of breeds.h5
    known_masks: np.ndarray | None  # (N,) bool, of masks.h5


def read_split_file(path):
    """The SplitFile at `path`; raises InputError unless it is as data_rechunk.py writes it."""
    rechunk = f'run python data_rechunk.py --data {path.parent.parent}'
    with reading_h5(path) as file:
        if not has_own(file, f'chunked_{path.stem}'):
            raise InputError(f"{path}: no 'chunked_{path.stem}'; {rechunk}")
        if not is_rechunked(file, path.stem):
            raise InputError(f'{path}: not as data_rechunk.py stores it; {rechunk}')
        dataset = find_dataset(file, f'chunked_{path.stem}')
        check_type(path, dataset)
        return SplitFile(
            length=len(dataset),
            size=tuple(map(int, dataset.shape[1:3])) if dataset.ndim == 4 else None,
            preparation=read_text(dataset.attrs, 'preparation'),
            fingerprint=fingerprint(dataset),
            table=dataset[()] if dataset.ndim == 2 else None,
            class_names=read_text(dataset.attrs, 'class_names'),
            known_masks=read_known_masks(file, len(dataset)) if path.stem == 'masks' else None,
        )


def read_names(folder, count):
    """The list of str in a split's names.h5; None without such a file, or if it holds no `count` names."""
    path = folder / 'names.h5'
    if not path.exists():
        return None
    with reading_h5(path) as file:
        names = file['names'][()] if has_own(file, 'names') else np.empty(0)
    if names.shape != (count,) or names.dtype.kind != 'S':
        return None
    return [name.decode(errors='replace') for name in names.tolist()]


def check_same(folder, what, values):
    """Raises InputError unless all of {stem: value} are equal."""
    if len(set(values.values())) > 1:
        listed = ', '.join(f'{stem} {value}' for stem, value in values.items())
        raise InputError(
            f'{folder}: the files do not belong together, their {what} differ: {listed}; prepare them again'
        )


def limited(items, limit):
    """At most `limit` of the list `items`, taken at regular intervals; all of them for None."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


# ---- values


def check_type(path, dataset):
    """Raises InputError for images that seem to be scaled to [0, 1] or are of a type that rechunking never leaves."""
    if path.stem == 'images' and dataset.dtype.kind != 'f' and dataset.dtype != np.uint8:
        raise InputError(f'{path}: {dataset.dtype}; data_rechunk.py --force stores it as uint8')
    if path.stem == 'images' and dataset.dtype.kind == 'f' and dataset[0].max() <= 1:
        raise InputError(f'{path}: the first image has no value above 1; images are expected as 0 to 255')


def check_class_names(path, names):
    """`names`; raises InputError unless they are a list of printable names."""
    if not are_names(names):
        raise InputError(
            f"{path}: no attribute 'class_names' with the breeds' names, each of 1 to 100 printable characters; "
            'prepare the data again, or train with the species by removing the file'
        )
    return names


def check_labels(path, table, n_classes):
    """(N, 1) numbers -> (N,) int64 labels, -1 where unknown."""
    values = table[:, 0]
    wrong = np.flatnonzero(~((values >= -1) & (values < n_classes) & (values == np.rint(values))))
    if len(wrong):
        raise InputError(
            f'{path}: sample {wrong[0]} has label {float(values[wrong[0]]):g}; '
            f'expected a whole number from 0 to {n_classes - 1}, or -1 for unknown'
        )
    return values.astype(np.int64)


def check_boxes(path, table, height, width):
    """(N, 4) numbers -> (N, 4) float32 in pixels of an image of height x width, NaN where unknown."""
    boxes = table.astype(np.float32)
    known = ~np.isnan(boxes).any(axis=1)
    # A pixel of slack: a box may be given by its first and last pixel, or rounded.
    low, high = (boxes >= -1).all(axis=1), (boxes <= (width + 1, height + 1) * 2).all(axis=1)
    wrong = np.flatnonzero(known & ~(low & high & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)))
    if len(wrong):
        raise InputError(
            f'{path}: sample {wrong[0]} has the box {boxes[wrong[0]].tolist()}; expected '
            f'xmin < xmax and ymin < ymax within an image of {width} x {height} pixels'
        )
    if known.any() and boxes[known].max() <= 1:
        raise InputError(f'{path}: no coordinate is above 1; boxes are expected in pixels')
    boxes[~known] = np.nan
    return boxes
