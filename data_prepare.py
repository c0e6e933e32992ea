"""Turn images and their annotations into the HDF5 splits that the other scripts read.

    python data_prepare.py                                  # draws synthetic pets, a minute
    python data_prepare.py --source oxford --download       # fetches Oxford-IIIT Pet (800 MB) first
    python data_prepare.py --source oxford --root DIR       # reads DIR/oxford-iiit-pet, or DIR if it is that folder
    python data_prepare.py --root DIR --split official      # its test.txt is the test split
    python data_prepare.py --root DIR --folds 5             # five ways to split, for the study
    python data_prepare.py --images DIR --masks DIR --labels FILE.csv    # images of your own (docs/data.md)

Writes `datasets/data_new/{train,val,test}/` with images.h5, masks.h5, bboxes.h5, binary.h5, breeds.h5 and
names.h5, a plain dataset each (docs/data.md), and prints a table of what is in each split; data_rechunk.py comes
next. An image is kept with whatever labels it has. Near-identical images go to the same split, unless it is
official. The same images, options and seed give the same splits.
"""

import argparse
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import InputError, StopRequest, positive_number, reason, run_script, whole_number
from support.files import lock_folder, replacing, sync
from support.hdf5 import (
    LARGEST_SIDE,
    MASK_UNKNOWN,
    SHAPES,
    SPLITS,
    create_h5,
    has_metadata_checksums,
    has_own,
    is_image_size,
    reading_h5,
    write_text,
)
from support.images import UnreadableFile
from support.sources import BORDER, OwnImages, OxfordPets, SyntheticPets, warn
from support.splits import limited

STEMS = (*SHAPES, 'names')
# Two images are near-identical if the Pearson correlation of their thumbnails is higher. In Oxford-IIIT Pet those
# are copies of one photograph; two shots of a scene have 0.974 at most.
DUPLICATE_CORRELATION = 0.99
OFFICIAL_SHARES = {'train': 80, 'val': 20}  # of trainval.txt
FOLD_SHARES = {'train': 7, 'val': 1}  # of the images that a fold does not test


def in_strata_order(records, seed):
    """Sort by labels, breed and a hash of name and seed: random, and independent of the order of files.

    Records taken from the result at regular intervals are stratified by labels and breed.
    """

    def key(record):
        mixed = hashlib.sha256(f'{seed} {record.name}'.encode()).digest()
        return record.has_mask, record.has_box, record.breed, mixed

    return sorted(records, key=key)


def match_thumbnails(thumbnails):
    """(N, H, W) uint8 -> (N,) int64: equal numbers for near-identical images, transitively."""
    distinct, inverse = np.unique(thumbnails.reshape(len(thumbnails), -1), axis=0, return_inverse=True)
    centred = distinct - distinct.mean(axis=1, keepdims=True, dtype=np.float32)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    centred /= np.where(norm, norm, 1)  # one colour stays zero: near-identical only to its equals
    group = np.arange(len(centred))
    step = 2**24 // len(centred) + 1  # rows of a product of about 64 MB
    for start in range(0, len(centred), step):
        near = centred[start : start + step] @ centred[start:].T > DUPLICATE_CORRELATION
        for row in np.flatnonzero(near.sum(axis=1) > 1):  # itself and another
            joined = group[start:][near[row]]
            group[np.isin(group, joined)] = joined[0]
    return group[inverse.reshape(-1)]


def group_duplicates(records, source):
    """List of groups, each a list of Record: near-identical images in one, every other image in its own.

    Groups stand in the order of their first record. Unreadable images are left out; raises InputError if all are.
    """
    thumbnails, errors = {}, []
    for record in tqdm(records, 'duplicates', unit='image', disable=None):
        try:
            thumbnails[record] = source.thumbnail(record)
        except UnreadableFile as error:
            errors.append(error)
    if not thumbnails:
        raise InputError(f'none of the {len(records)} images can be read, the first is {errors[0]}; {source.hint}')
    for error in errors:
        warn(error)
    if errors:
        print(f'unreadable images left out: {len(errors)} (named in the warnings above)')
    groups = {}
    for record, number in zip(thumbnails, match_thumbnails(np.stack(list(thumbnails.values())))):
        groups.setdefault(number, []).append(record)
    return list(groups.values())


def split_groups(groups, shares):
    """Deal groups of records in strata order to the splits of {split: share}: {split: list of Record}.

    Each group goes to the split that is then furthest behind its share. So the shares hold overall, and in every
    stratum, up to about the size of a group.
    """
    splits, total, dealt = {split: [] for split in shares}, sum(shares.values()), 0
    for group in groups:
        dealt += len(group)
        behind = {split: share / total * dealt - len(splits[split]) for split, share in shares.items()}
        splits[max(behind, key=behind.get)] += group
    return splits


def split_officially(groups, test):
    """{split: list of Record}: the set `test` is the test split, the other records are dealt to train and val."""
    others = [[record for record in group if record not in test] for group in groups]
    splits = split_groups([group for group in others if group], OFFICIAL_SHARES)
    return {**splits, 'test': [record for group in groups for record in group if record in test]}


def make_folds(groups, count):
    """A list of `count` dicts {split: list of Record}; each record is in the test split of one of them."""
    parts = split_groups(groups, dict.fromkeys(range(count), 1))
    folds = []
    for test in parts.values():
        tested = set(test)
        others = [group for group in groups if group[0] not in tested]
        folds.append({**split_groups(others, FOLD_SHARES), 'test': test})
    return folds


def print_duplicates(groups, splits):
    """Say how many images are near-identical, and whether any lie across splits."""
    duplicates = [group for group in groups if len(group) > 1]
    if duplicates:
        split_of = {record: split for split, records in splits.items() for record in records}
        across = sum(len({split_of[record] for record in group}) > 1 for group in duplicates)
        kept = f'{across} of them across trainval.txt and test.txt (not moved)' if across else 'each kept in one split'
        print(f'near-identical images: {sum(map(len, duplicates))} in {len(duplicates)} groups, {kept}')


def write_split(files, source, split, records, size, digest, stop):
    """Write one split to its open files, {stem: h5py.File}; returns its row of the printed table.

    Images and masks go to the disk one by one, and what is stored goes into `digest`.
    """
    count, masks_known, boxes = len(records), 0, np.empty((len(records), 4), np.float32)
    images = files['images'].create_dataset('images', (count, size, size, 3), np.uint8)
    masks = files['masks'].create_dataset('masks', (count, size, size, 1), np.uint8)
    for index, record in enumerate(tqdm(records, split, unit='image', disable=None)):
        stop.check()
        images[index], masks[index], boxes[index] = sample = source.read(record, size)
        masks_known += int((sample[1] != MASK_UNKNOWN).any())
        digest.update(f'{split} {record.name} {record.species} {record.breed}'.encode())
        for values in sample:
            digest.update(values.tobytes())
    files['bboxes']['bboxes'] = boxes
    files['binary']['binary'] = np.array([[record.species] for record in records], np.int8)
    files['breeds']['breeds'] = np.array([[record.breed] for record in records], np.int16)
    files['names']['names'] = np.array([record.name.encode() for record in records])
    write_text(files['breeds']['breeds'].attrs, 'class_names', source.class_names)
    boxes_known = np.isfinite(boxes).all(axis=1).sum()
    cats, dogs = (sum(record.species == number for record in records) for number in (0, 1))
    return count, masks_known, boxes_known, cats, dogs, len({record.breed for record in records} - {-1})


def refuse_to_replace_others(path):
    """Raises InputError if there is a file at `path` that this script did not write."""
    try:
        with reading_h5(path) as file:
            if has_metadata_checksums(file) and has_own(file, path.stem) and 'preparation' in file[path.stem].attrs:
                return
    except InputError:  # missing, damaged, or not an HDF5 file
        pass
    if os.path.lexists(path):
        raise InputError(
            f'{path}: was not made by data_prepare.py, or is damaged, and is left alone; choose another --out or '
            'move it away'
        )


def prepare(source, splits, out, size, options):
    """Write {split: list of Record} under `out` and print what the splits hold.

    No file is replaced before all are written.
    """
    out, count = Path(out), sum(map(len, splits.values()))
    for split in SPLITS:
        if not splits[split]:
            raise InputError(
                f'{out}: the {split} split is empty; there are {count} images; take more images or another --split'
            )
        for stem in STEMS:
            refuse_to_replace_others(out / split / f'{stem}.h5')
    digest = hashlib.sha256(f'{options} {source.class_names}'.encode())
    rows, new_files, datasets = {}, [], []
    with StopRequest() as stop, ExitStack() as renames:
        for split in SPLITS:
            renames.enter_context(lock_folder(out / split))
        with ExitStack() as open_files:
            for split in SPLITS:
                files, records = {}, sorted(splits[split])
                for stem in STEMS:
                    new_files.append(renames.enter_context(replacing(out / split / f'{stem}.h5')))
                    files[stem] = open_files.enter_context(create_h5(new_files[-1]))
                rows[split] = write_split(files, source, split, records, size, digest, stop)
                datasets += [files[stem][stem] for stem in STEMS]
            for dataset in datasets:
                write_text(dataset.attrs, 'preparation', digest.hexdigest()[:16])
        for path in new_files:
            sync(path)  # before the first is renamed
    print(f'{"split":8}{"images":>8}{"masks":>8}{"boxes":>8}{"cats":>8}{"dogs":>8}{"classes":>8}')
    for split, row in rows.items():
        print(f'{split:8}' + ''.join(f'{number:8}' for number in row))
    print(f'written to {out}')


def print_left_out(source):
    """Name what `source` could not use while it was read."""
    if source.unreadable:
        print(f'unreadable annotations left out: {len(source.unreadable)} (named in the warnings above)')
    if source.petless:
        names = sorted(source.petless)
        listed = ', '.join(names[:20]) + (', ...' if len(names) > 20 else '')
        print(f'masks without a pet, stored as unknown: {len(names)} ({listed})')


def parse_split(text):
    """'official', or '80-10-10' as three positive numbers."""
    if text == 'official':
        return text
    shares = tuple(map(positive_number, text.split('-')))
    if len(shares) != 3:
        raise argparse.ArgumentTypeError(f"'{text}' is neither official nor three positive numbers like 80-10-10")
    return shares


def main(argv=None):
    parser = argparse.ArgumentParser(description='Turn images and their annotations into HDF5 splits.')
    add = parser.add_argument
    source_help = 'default: oxford with --root or --download, own with --images, else synthetic'
    add('--source', choices=('oxford', 'own', 'synthetic'), help=source_help)
    add('--root', metavar='DIR', help='folder that holds oxford-iiit-pet/, or that folder')
    add('--download', action='store_true', help='fetch Oxford-IIIT Pet into --root first, or into datasets/')
    add('--images', metavar='DIR', help='images of your own, searched to any depth')
    add('--masks', metavar='DIR', help='their masks: PNG files of the same names')
    labels_help = "a CSV with a column 'image' and any of class, species, xmin, ymin, xmax, ymax (pixels)"
    add('--labels', metavar='FILE', help=labels_help)
    add('--out', default='datasets/data_new', metavar='DIR', help='where the splits go (default: %(default)s)')
    add('--size', type=int, default=256, metavar='PIXELS', help='stored width and height (default: %(default)s)')
    split = 'shares of train, val and test, or official: trainval.txt as 80-20, and test.txt (default: %(default)s)'
    shares = parser.add_mutually_exclusive_group()
    shares.add_argument('--split', type=parse_split, default='80-10-10', metavar='A-B-C|official', help=split)
    folds = 'write DIR/fold0 ... with train, val and test each; each image is in the test split of one of them'
    shares.add_argument('--folds', type=whole_number(2), metavar='K', help=folds)
    add(
        '--seed',
        type=whole_number(0),
        default=0,
        help='random seed of the split and of the drawn pets (default: %(default)s)',
    )
    add('--border', choices=BORDER, default='pet', help="what the trimap's border counts as (default: %(default)s)")
    add('--limit', type=whole_number(1), metavar='N', help='take N images, stratified (default: all, or 1200 drawn)')
    args = parser.parse_args(argv)
    if not is_image_size(args.size):
        parser.error(f'--size {args.size}: the networks take multiples of 16 from 64 to {LARGEST_SIDE}')

    kind = args.source or ('own' if args.images else 'oxford' if args.root or args.download else 'synthetic')
    if kind != 'oxford' and (args.root or args.download or args.split == 'official'):
        parser.error('--root, --download and --split official belong to --source oxford')
    if (kind == 'own') != bool(args.images) or kind != 'own' and (args.masks or args.labels):
        parser.error('--source own needs --images; --masks and --labels belong to it')
    if kind == 'synthetic':
        source = SyntheticPets(args.limit or 1200, args.seed)
    elif kind == 'own':
        source = OwnImages(args.images, args.masks, args.labels, args.border)
    else:
        root = args.root or 'datasets'
        if args.download:
            download(root)
        source = OxfordPets(root, args.border)
    options = f'{kind} {args.size} {args.split} {args.seed} {args.border} {args.limit}'
    trainval, test = source.official_parts() if args.split == 'official' else (source.records, ())
    records = limited(in_strata_order([*trainval, *test], args.seed), args.limit)
    # Each pet is drawn with random numbers of its own, so no two are near-identical.
    groups = [[record] for record in records] if kind == 'synthetic' else group_duplicates(records, source)
    if args.folds:
        folds = make_folds(groups, args.folds)
        runs = {f'fold{number}': splits for number, splits in enumerate(folds)}
    else:
        splits = split_officially(groups, test) if test else split_groups(groups, dict(zip(SPLITS, args.split)))
        runs = {'': splits}
    print_duplicates(groups, next(iter(runs.values())))
    for fold, splits in runs.items():
        prepare(source, splits, Path(args.out) / fold, args.size, f'{options} {args.folds} {fold}')
    print_left_out(source)
    print(f'next: python data_rechunk.py --data {args.out}')


def download(root):
    """Fetch and unpack the official release (about 800 MB) into `root/oxford-iiit-pet`."""
    from torchvision.datasets import OxfordIIITPet  # here, because importing torch takes seconds

    try:
        OxfordIIITPet(root, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f'{root}: the download failed ({reason(error)}); run the command again') from None


if __name__ == '__main__':
    run_script(main)
