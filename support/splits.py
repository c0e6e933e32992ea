"""A split of the prepared and rechunked data: what its files hold besides pixels, checked. Imports no torch.

Which masks are known is read from what data_rechunk.py recorded, so a split of any size opens at once.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cli import InputError, are_names
from support.hdf5 import OPTIONAL, SHAPES, find_rechunked, fingerprint, has_own, read_known_masks, read_text, reading_h5

SPECIES = ('cat', 'dog')


class Split(NamedTuple):
    """What `read_split` finds; N is the number of samples."""

    image_size: tuple  # (height, width) of the stored images
    preparation: str | None  # identifies what data_prepare.py wrote; None for files made elsewhere
    class_names: list  # of str, the name of each label
    class_species: list  # of str, 'cat' or 'dog' for each label; None if its samples are of none or both
    labels: np.ndarray  # (N,) int64, -1 unknown
    bboxes: np.ndarray  # (N, 4) float32: xmin, ymin, xmax, ymax in pixels, NaN unknown
    known: dict  # {'mask', 'class', 'box': (N,) bool}, whether the sample has the label
    fingerprints: dict  # {stem: `hdf5.fingerprint`}, to notice files that are replaced by others


def read_split(folder):
    """The Split in `folder`.

    The class is the breed if there is a breeds.h5, else the species. Raises InputError for files that are missing,
    damaged, not rechunked or of different preparations, and for labels and boxes that cannot be.
    """
    folder, tables, fingerprints, preparations = Path(folder), {}, {}, {}
    for stem in SHAPES:
        path = folder / f'{stem}.h5'
        if stem in OPTIONAL and not path.exists():
            continue
        with reading_h5(path) as file:
            dataset = find_rechunked(file, path)
            fingerprints[stem] = fingerprint(dataset)
            preparations[stem] = read_text(dataset.attrs, 'preparation')
            if stem == 'masks':
                known_masks = read_known_masks(file, len(dataset))
            elif stem != 'images':
                tables[stem] = dataset[()]
            if stem == 'breeds':
                breed_names = read_text(dataset.attrs, 'class_names')
    shapes = {stem: shape for stem, (shape, *_) in fingerprints.items()}
    check_same(folder, 'lengths', {stem: shape[0] for stem, shape in shapes.items()})
    check_same(folder, 'sizes', {stem: shapes[stem][1:3] for stem in ('images', 'masks')})
    check_same(folder, 'preparations', preparations)
    species = check_labels(folder / 'binary.h5', tables['binary'], len(SPECIES))
    labels, class_names = species, list(SPECIES)
    if 'breeds' in tables:
        class_names = check_class_names(folder / 'breeds.h5', breed_names)
        labels = check_labels(folder / 'breeds.h5', tables['breeds'], len(class_names))
    image_size = shapes['images'][1:3]
    bboxes = check_boxes(folder / 'bboxes.h5', tables['bboxes'], *image_size)
    return Split(
        image_size=image_size,
        preparation=preparations['images'],
        class_names=class_names,
        class_species=[find_species(species[labels == number]) for number in range(len(class_names))],
        labels=labels,
        bboxes=bboxes,
        known={'mask': known_masks, 'class': labels >= 0, 'box': ~np.isnan(bboxes).any(axis=1)},
        fingerprints=fingerprints,
    )


def find_species(numbers):
    """The one of SPECIES that all known `numbers` stand for, else None."""
    found = set(numbers[numbers >= 0].tolist())
    return SPECIES[found.pop()] if len(found) == 1 else None


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


def limited(items, limit):
    """At most `limit` of the list `items`, taken at regular intervals; all of them for None."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


# ---- values


def check_same(folder, what, values):
    """Raises InputError unless all of {stem: value} are equal."""
    if len(set(values.values())) > 1:
        listed = ', '.join(f'{stem} {value}' for stem, value in values.items())
        raise InputError(
            f'{folder}: the files do not belong together, their {what} differ: {listed}; prepare them again'
        )


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
