"""Turn images and their annotations into the HDF5 splits that the other scripts read.

    python data_prepare.py                                  # draws synthetic pets, a minute
    python data_prepare.py --source oxford --download       # fetches Oxford-IIIT Pet (800 MB) first
    python data_prepare.py --source oxford --root DIR       # reads DIR/oxford-iiit-pet
    python data_prepare.py --root DIR --split official      # its test.txt is the test split
    python data_prepare.py --root DIR --folds 5             # five ways to split, for study.py

Writes `datasets/data_new/{train,val,test}/` with images.h5, masks.h5, bboxes.h5, binary.h5, breeds.h5 and
names.h5 (formats: README.md) and prints a table of what is in each split. An image is kept with whatever
labels it has. Near-identical images go to the same split, unless it is official. The same images, options and
seed give the same splits.
"""

import argparse
import hashlib
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import synthetic_pets
from support.cli import InputError, StopRequest, are_names, one_line, positive_number, reason, run_script, whole_number
from support.files import UnreadableFile, lock_folder, open_image, read_image, replacing, require_file, sync, to_rgb
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
from support.splits import limited

BORDER = {'pet': 1, 'background': 0, 'ignore': MASK_UNKNOWN}
STEMS = (*SHAPES, 'names')
THUMBNAIL = (16, 16)
# Two images are near-identical if the Pearson correlation of their thumbnails is higher. In Oxford-IIIT Pet those
# are copies of one photograph; two shots of a scene have 0.974 at most.
DUPLICATE_CORRELATION = 0.99
OFFICIAL_SHARES = {'train': 80, 'val': 20}  # of trainval.txt
FOLD_SHARES = {'train': 7, 'val': 1}  # of the images that a fold does not test


class Record(NamedTuple):
    """What is known of an image before it is read; enough to choose its split."""

    name: str
    species: int  # 0 cat, 1 dog
    breed: int
    has_mask: bool
    has_box: bool


class LabelledImage(NamedTuple):
    """An image at its stored size; an unknown label is None."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    mask: np.ndarray | None  # (H, W, 1) uint8: 1 pet, 0 background, 255 unknown
    bbox: np.ndarray | None  # (4,) float32: xmin, ymin, xmax, ymax in pixels


class OxfordPets:
    """The Oxford-IIIT Pet dataset in its official layout, `root/oxford-iiit-pet`."""

    def __init__(self, root, border):
        self.folder = Path(root) / 'oxford-iiit-pet'
        # What is stored for the trimap's 1 pet, 2 background and 3 border.
        self.trimap_values = np.array([MASK_UNKNOWN, 1, 0, BORDER[border]], np.uint8)
        self.records, self.class_names = self._read_list('list.txt', '--download fetches the dataset')

    def official_parts(self):
        """(set of the records in trainval.txt, set of those in test.txt); raises InputError if they do not fit."""
        hint = 'take list.txt, trainval.txt and test.txt from one release, or choose shares for --split'
        known, parts = set(self.records), []
        for file in 'trainval.txt', 'test.txt':
            records, path = self._read_list(file, hint)[0], self.folder / 'annotations' / file
            for record in records:
                if record not in known:
                    raise InputError(f"{path}: '{record.name}' is not in list.txt, or of another class there; {hint}")
                if parts and record in parts[0]:
                    raise InputError(f"{path}: '{record.name}' is in trainval.txt as well; {hint}")
            parts.append(set(records))
        return parts

    def _read_list(self, file, hint):
        """Records and class names of `NAME CLASS-ID SPECIES BREED-ID` lines: ids from 1, species 1 cat and 2 dog."""
        path = self.folder / 'annotations' / file
        require_file(path, hint)
        try:
            lines = path.read_text('utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f'{path}: not a text file ({reason(error)})') from None
        records, class_names = {}, {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith('#'):
                continue
            where = f'{path}, line {number}'
            try:
                name, *ids = line.split()
                class_id, species, _ = map(int, ids)
            except ValueError:
                raise InputError(f"{where}: '{line}' is not NAME CLASS-ID SPECIES BREED-ID") from None
            if not 1 <= class_id <= 37 or species not in (1, 2):
                raise InputError(
                    f'{where}: class {class_id} and species {species}; '
                    'expected a class from 1 to 37 and a species 1 or 2'
                )
            breed_name = name.rpartition('_')[0]
            plain = Path(name).name == name and name.isprintable() and len(name) <= 200 and are_names([breed_name])
            if name in records or not plain:
                raise InputError(f"{where}: '{name}' is listed twice or is not a file name like Abyssinian_12")
            if class_names.setdefault(class_id, breed_name) != breed_name:
                raise InputError(f"{where}: class {class_id} is '{class_names[class_id]}' and '{breed_name}'")
            records[name] = Record(
                name, species - 1, class_id - 1, self._file('trimaps', name).exists(), self._file('xmls', name).exists()
            )
        if not records:
            raise InputError(f'{path}: lists no image; {hint}')
        names = [class_names.get(i, f'class {i}') for i in range(1, max(class_names, default=0) + 1)]
        return list(records.values()), names

    def _file(self, kind, name):
        if kind == 'images':
            return self.folder / 'images' / f'{name}.jpg'
        return self.folder / 'annotations' / kind / f'{name}{".png" if kind == "trimaps" else ".xml"}'

    def thumbnail(self, record):
        """The record's image in grey at the size THUMBNAIL; None if it is unreadable."""
        try:
            with open_image(self._file('images', record.name)) as image:
                image.draft('L', (64, 64))  # a JPEG is decoded in grey, at a quarter or so of its size
                return np.asarray(to_rgb(image).convert('L').resize(THUMBNAIL, Image.Resampling.BOX))
        except UnreadableFile:  # `read` warns
            return None

    def read(self, record, size, warn):
        """The record's LabelledImage; raises UnreadableFile for the image, passes that of an annotation to `warn`."""
        path = self._file('images', record.name)
        image = read_image(path).resize((size, size), Image.Resampling.BILINEAR)
        labels = []
        for known, read in (record.has_mask, self._read_mask), (record.has_box, self._read_box):
            try:
                labels.append(read(record.name, size) if known else None)
            except UnreadableFile as error:
                warn(error)
                labels.append(None)
        return LabelledImage(np.asarray(image), *labels)

    def _read_mask(self, name, size):
        path = self._file('trimaps', name)
        with open_image(path) as trimap:
            values = np.asarray(trimap.resize((size, size), Image.Resampling.NEAREST))
        found = np.unique(values)
        if values.ndim != 2 or values.dtype.kind not in 'iu' or not np.isin(found, (1, 2, 3)).all():
            raise UnreadableFile(f'{path}: values {found[:5].tolist()}; a trimap holds 1, 2 and 3')
        return self.trimap_values[values][..., None]

    def _read_box(self, name, size):
        path = self._file('xmls', name)
        try:
            root = ElementTree.parse(path).getroot()
            # A missing element reads 'none', which is no number.
            corners = [float(root.findtext(f'object/bndbox/{key}', 'none')) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            # The size that was annotated; the image on disk may have another.
            extent = [float(root.findtext(f'size/{key}', 'none')) for key in ('width', 'height')] * 2
        except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
            raise UnreadableFile(f'{path}: no <bndbox> and <size> in numbers ({reason(error)})') from None
        if not all(np.isfinite(corners + extent)) or min(extent) <= 0:
            raise UnreadableFile(f'{path}: the box {corners} in an image of {extent[0]:g} x {extent[1]:g}')
        bbox = np.clip(np.divide(corners, extent), 0, 1)
        if not (bbox[:2] < bbox[2:]).all():
            raise UnreadableFile(f'{path}: the box {corners} has no area inside the image')
        return (bbox * size).astype(np.float32)


class SyntheticPets:
    """`count` drawn pets with every label."""

    def __init__(self, count, seed):
        self.seed = seed
        self.class_names = [breed.name for breed in synthetic_pets.BREEDS]
        self.records = []
        for index in range(count):
            breed = index % len(self.class_names)
            name = f'{self.class_names[breed]}_{index}'
            species = synthetic_pets.BREEDS[breed].species
            self.records.append(Record(name, species, breed, has_mask=True, has_box=True))

    def thumbnail(self, record):
        """None: each pet is drawn with random numbers of its own, so no two are near-identical."""

    def read(self, record, size, warn):
        pet = synthetic_pets.draw_pet(int(record.name.rpartition('_')[2]), self.seed, size)
        return LabelledImage(pet.image, pet.mask, pet.bbox)


def in_strata_order(records, seed):
    """Sort by labels, breed and a hash of name and seed: random, and independent of the order of files.

    Records taken from the result at regular intervals are stratified by labels and breed.
    """

    def key(record):
        mixed = hashlib.sha256(f'{seed} {record.name}'.encode()).digest()
        return record.has_mask, record.has_box, record.breed, mixed

    return sorted(records, key=key)


def match_thumbnails(thumbnails):
    """(N, H, W) uint8 -> (N,) int64: equal numbers for near-identical images, also by way of others."""
    distinct, inverse = np.unique(thumbnails.reshape(len(thumbnails), -1), axis=0, return_inverse=True)
    centred = distinct - distinct.mean(axis=1, keepdims=True, dtype=np.float32)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    centred /= np.where(norm, norm, 1)  # one colour stays zero: near-identical to its equals alone
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

    Groups stand in the order of their first record.
    """
    thumbnails = [source.thumbnail(record) for record in tqdm(records, 'duplicates', unit='image', disable=None)]
    readable = [i for i, thumbnail in enumerate(thumbnails) if thumbnail is not None]
    numbers, groups = -np.arange(1, len(records) + 1), {}  # each alone; `match_thumbnails` counts from 0
    if readable:
        numbers[readable] = match_thumbnails(np.stack([thumbnails[i] for i in readable]))
    for record, number in zip(records, numbers):
        groups.setdefault(number, []).append(record)
    return list(groups.values())


def split_groups(groups, shares):
    """Deal groups of records in strata order to the splits of {split: share}: {split: list of Record}.

    Each group goes to the split that is then furthest behind its share, so the shares hold in every stratum to
    within about the size of a group, and overall.
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


class SplitWriter:
    """Writes the six files of one split. Images and masks go to the disk one by one, the small tables at the end."""

    def __init__(self, files, count, size):
        """`files`: {stem: open h5py.File}; `count`: of images, at most; `size`: of an image's side in pixels."""
        self.files, self.rows, self.labels = files, [], Counter()
        for stem, channels in ('images', 3), ('masks', 1):
            shape = (size, size, channels)
            files[stem].create_dataset(stem, (count, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape))

    def add(self, record, sample):
        index, mask, bbox = len(self.rows), sample.mask, sample.bbox
        self.files['images']['images'][index] = sample.image
        self.files['masks']['masks'][index] = MASK_UNKNOWN if mask is None else mask
        self.rows.append((np.full(4, np.nan) if bbox is None else bbox, record))
        self.labels.update(masks=mask is not None, boxes=bbox is not None)

    def finish(self, class_names, preparation):
        """Write the tables; mark the files with the text that all files of one preparation share."""
        bboxes, records = zip(*self.rows)
        tables = {
            'bboxes': np.array(bboxes, np.float32),
            'binary': np.array([[record.species] for record in records], np.uint8),
            'breeds': np.array([[record.breed] for record in records], np.int16),
            'names': np.array([record.name.encode() for record in records]),
        }
        for stem, file in self.files.items():
            if stem in tables:
                file[stem] = tables[stem]
            else:
                file[stem].resize(len(records), axis=0)  # without the unreadable images
            write_text(file[stem].attrs, 'preparation', preparation)
        write_text(self.files['breeds']['breeds'].attrs, 'class_names', class_names)

    def summary(self):
        """The split's row of the printed table."""
        species = Counter(record.species for _, record in self.rows)
        breeds = {record.breed for _, record in self.rows}
        return len(self.rows), self.labels['masks'], self.labels['boxes'], species[0], species[1], len(breeds)


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
    out = Path(out)
    count = sum(map(len, splits.values()))
    unreadable = Counter()

    def warn(error, kind='annotation'):
        unreadable[kind] += 1
        tqdm.write(one_line(f'warning: {error}'), file=sys.stderr)

    targets = {split: {stem: out / split / f'{stem}.h5' for stem in STEMS} for split in SPLITS}
    for paths in targets.values():
        for path in paths.values():
            refuse_to_replace_others(path)
    writers, new_files, digest = {}, [], hashlib.sha256(options.encode())
    with StopRequest() as stop, ExitStack() as renames:
        for split in SPLITS:
            renames.enter_context(lock_folder(out / split))
        with ExitStack() as open_files, tqdm(total=count, unit='image', disable=None) as bar:
            for split in SPLITS:
                files = {}
                for stem, path in targets[split].items():
                    new_files.append(renames.enter_context(replacing(path)))
                    files[stem] = open_files.enter_context(create_h5(new_files[-1]))
                writer = writers[split] = SplitWriter(files, len(splits[split]), size)
                for record in sorted(splits[split]):
                    stop.check()
                    try:
                        sample = source.read(record, size, warn)
                        writer.add(record, sample)
                        found = f'{split} {record} {sample.mask is not None} {sample.bbox is not None}'
                        digest.update(found.encode())
                    except UnreadableFile as error:
                        warn(error, 'image')
                    bar.update()
                if not writer.rows:
                    raise InputError(
                        f'{out}: the {split} split is empty; there are {count} images; take more or other shares'
                    )
            for writer in writers.values():
                writer.finish(source.class_names, digest.hexdigest()[:16])
        for path in new_files:
            sync(path)  # before the first is renamed
    print(f'{"split":8}{"images":>8}{"masks":>8}{"boxes":>8}{"cats":>8}{"dogs":>8}{"breeds":>8}')
    for split, writer in writers.items():
        print(f'{split:8}' + ''.join(f'{count:8}' for count in writer.summary()))
    for kind, count in sorted(unreadable.items()):
        print(f'unreadable {kind}s left out: {count} (named in the warnings above)')
    print(f'written to {out}; next: python data_rechunk.py --data {out}')


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
    add('--source', choices=('oxford', 'synthetic'), help='default: oxford with --root or --download, else synthetic')
    add('--root', metavar='DIR', help='folder that holds oxford-iiit-pet/')
    add('--download', action='store_true', help='fetch Oxford-IIIT Pet into --root first, or into datasets/')
    add('--out', default='datasets/data_new', metavar='DIR', help='where the splits go (default: %(default)s)')
    add('--size', type=int, default=256, metavar='PIXELS', help='stored width and height (default: %(default)s)')
    split = 'shares of train, val and test, or official: trainval.txt as 80-20, and test.txt (default: %(default)s)'
    shares = parser.add_mutually_exclusive_group()
    shares.add_argument('--split', type=parse_split, default='80-10-10', metavar='A-B-C|official', help=split)
    folds = (
        'write DIR/fold0 ... with train, val and test each; the test splits are disjoint and together hold all images'
    )
    shares.add_argument('--folds', type=whole_number(2), metavar='K', help=folds)
    add('--seed', type=whole_number(0), default=0, help='of the split and of drawing (default: %(default)s)')
    add('--border', choices=BORDER, default='pet', help="what the trimap's border counts as (default: %(default)s)")
    add('--limit', type=whole_number(1), metavar='N', help='take N images, stratified (default: all, or 1200 drawn)')
    args = parser.parse_args(argv)
    if not is_image_size(args.size):
        parser.error(f'--size {args.size}: the networks take multiples of 16 from 64 to {LARGEST_SIDE}')

    kind = args.source or ('oxford' if args.root or args.download else 'synthetic')
    if kind == 'synthetic':
        if args.root or args.download or args.split == 'official':
            parser.error('--root, --download and --split official belong to --source oxford')
        source = SyntheticPets(args.limit or 1200, args.seed)
    else:
        root = args.root or 'datasets'
        if args.download:
            download(root)
        source = OxfordPets(root, args.border)
    options = f'{kind} {args.size} {args.split} {args.seed} {args.border} {args.limit}'
    trainval, test = source.official_parts() if args.split == 'official' else (source.records, ())
    records = limited(in_strata_order([*trainval, *test], args.seed), args.limit)
    groups = group_duplicates(records, source)
    if args.folds:
        folds = make_folds(groups, args.folds)
        print_duplicates(groups, folds[0])
        for number, splits in enumerate(folds):
            prepare(source, splits, Path(args.out) / f'fold{number}', args.size, f'{options} {number} of {args.folds}')
        return
    splits = split_officially(groups, test) if test else split_groups(groups, dict(zip(SPLITS, args.split)))
    print_duplicates(groups, splits)
    prepare(source, splits, args.out, args.size, options)


def download(root):
    """Fetch and unpack the official release (about 800 MB) into `root/oxford-iiit-pet`."""
    from torchvision.datasets import OxfordIIITPet  # here, because importing torch takes seconds

    try:
        OxfordIIITPet(root, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f'{root}: the download failed ({reason(error)}); run the command again') from None


if __name__ == '__main__':
    run_script(main)
