"""Turn photographs and their annotations into the HDF5 splits that the other scripts read.

    python data_prepare.py                                  # draws synthetic pets, a minute
    python data_prepare.py --source oxford --download       # fetches Oxford-IIIT Pet (800 MB) first
    python data_prepare.py --source oxford --root DIR       # reads DIR/oxford-iiit-pet

Writes `datasets/data_new/{train,val,test}/` with images.h5, masks.h5, bboxes.h5, binary.h5, breeds.h5
and names.h5 (README.md has the formats) and ends with a table of what is in each split. A photograph
is kept with whatever labels it has. The same photographs, options and seed give the same splits.
"""

import argparse
import hashlib
import os
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import synthetic_pets
from data_rechunk import (LARGEST_SIDE, MASK_UNKNOWN, SPLITS, InputError, Interruption, alone_in, create_h5,
                          has_checksums, has_own, in_own_process, networks_take, one_line, reading_h5, reason,
                          replacing, run_script, whole_number)

BORDER = {'pet': 1, 'background': 0, 'ignore': MASK_UNKNOWN}
STEMS = ('images', 'masks', 'bboxes', 'binary', 'breeds', 'names')
BUFFERED = 64  # samples gathered before they are written


class Record(NamedTuple):
    """What is known of a photograph before it is read; enough to choose its split."""

    name: str
    species: int  # 0 cat, 1 dog
    breed: int
    has_mask: bool
    has_box: bool


class Sample(NamedTuple):
    """A photograph at its stored size; a label that is not known is None."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    mask: np.ndarray | None  # (H, W, 1) uint8: 1 pet, 0 background, 255 unknown
    bbox: np.ndarray | None  # (4,) float32: xmin, ymin, xmax, ymax in pixels


class Unreadable(Exception):
    """A photograph or an annotation that cannot be used; the message names the file."""


class OxfordPets:
    """The Oxford-IIIT Pet dataset in its official layout, `root/oxford-iiit-pet`."""

    def __init__(self, root, border):
        self.folder = Path(root) / 'oxford-iiit-pet'
        # From the trimap's 1 pet, 2 background, 3 border to the stored values.
        self.trimap_values = {1: 1, 2: 0, 3: BORDER[border]}
        self.records, self.class_names = self._read_list(self.folder / 'annotations' / 'list.txt')

    def _read_list(self, path):
        """Read `NAME CLASS-ID SPECIES BREED-ID` lines: ids from 1, species 1 cat and 2 dog."""
        try:
            lines = read_bounded(path, LARGEST_LIST).decode().splitlines()
        except FileNotFoundError:
            raise InputError(f'{path}: no such file; --download fetches the dataset') from None
        except (UnicodeDecodeError, Unreadable) as error:
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
                raise InputError(f'{where}: class {class_id} and species {species}; '
                                 'expected a class from 1 to 37 and a species 1 or 2')
            if name in records or Path(name).name != name or not name.isprintable() or len(name) > 200:
                raise InputError(f"{where}: '{name}' is listed twice or is not a plain file name")
            breed_name = name.rpartition('_')[0]
            if class_names.setdefault(class_id, breed_name) != breed_name:
                raise InputError(f"{where}: class {class_id} is '{class_names[class_id]}' and "
                                 f"'{breed_name}'")
            records[name] = Record(name, species - 1, class_id - 1, self._file('trimaps', name).exists(),
                                   self._file('xmls', name).exists())
        names = [class_names.get(i, f'class {i}') for i in range(1, max(class_names, default=0) + 1)]
        return list(records.values()), names

    def _file(self, kind, name):
        if kind == 'images':
            return self.folder / 'images' / f'{name}.jpg'
        return self.folder / 'annotations' / kind / f'{name}{".png" if kind == "trimaps" else ".xml"}'

    def read(self, record, size, warn):
        """The record's Sample; raises Unreadable for the photograph, warns of its annotations."""
        path = self._file('images', record.name)
        image = read_photograph(path).resize((size, size), Image.Resampling.BILINEAR)
        labels = []
        for known, read in (record.has_mask, self._read_mask), (record.has_box, self._read_box):
            try:
                labels.append(read(record.name, size) if known else None)
            except Unreadable as error:
                warn(error)
                labels.append(None)
        return Sample(np.asarray(image), *labels)

    def _read_mask(self, name, size):
        path = self._file('trimaps', name)
        with opened_image(path) as trimap:
            values = np.asarray(trimap.resize((size, size), Image.Resampling.NEAREST))
        found = np.unique(values)
        if values.ndim != 2 or not set(found.tolist()) <= self.trimap_values.keys():
            raise Unreadable(f'{path}: values {found[:5].tolist()}; a trimap holds 1, 2 and 3')
        table = np.zeros(4, np.uint8)
        table[list(self.trimap_values)] = list(self.trimap_values.values())
        return table[values][..., None]

    def _read_box(self, name, size):
        path = self._file('xmls', name)
        try:
            root = ElementTree.fromstring(read_bounded(path, LARGEST_XML))
            corners = [float(root.findtext(f'object/bndbox/{key}', 'none'))
                       for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            # The annotator's picture, which need not be as large as the photograph on disk.
            extent = [float(root.findtext(f'size/{key}', 'none')) for key in ('width', 'height')] * 2
        except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
            raise Unreadable(f'{path}: no <bndbox> and <size> in numbers ({reason(error)})') from None
        if not all(np.isfinite(corners + extent)) or min(extent) <= 0:
            raise Unreadable(f'{path}: the box {corners} in a picture of {extent[0]:g} x {extent[1]:g}')
        bbox = np.clip(np.divide(corners, extent), 0, 1)
        if not (bbox[:2] < bbox[2:]).all():
            raise Unreadable(f'{path}: the box {corners} has no area inside the picture')
        return (bbox * size).astype(np.float32)


LARGEST_LIST, LARGEST_XML = 100 << 20, 1 << 20  # bytes; the dataset's have 300 thousand and a thousand


@cache
def formats():
    """What cameras, phones and browsers write, as far as this Pillow has it.

    Pillow knows others, and starts a program for one of them (EPS).
    """
    Image.init()  # here, because it takes a while and most imports of this file read no photograph
    return [name for name in ('JPEG', 'MPO', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'AVIF') if name in Image.OPEN]


def require_file(path):
    """Raises Unreadable for what is there and no file: a pipe would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Unreadable(f'{path}: is not a file')


def read_bounded(path, most):
    """The bytes of a file; raises Unreadable if it has more than `most` or is no file at all."""
    require_file(path)
    with open(path, 'rb') as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Unreadable(f'{path}: more than {most} bytes')
    return content


@contextmanager
def opened_image(path):
    """Yield the file's PIL image; raises Unreadable for any that Pillow cannot read, also in the block."""
    require_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow's remarks on readable files: very large, palette transparency, damaged EXIF.
            warnings.simplefilter('ignore')
            with Image.open(path, formats=formats()) as image:
                yield image
    except Exception as error:  # Pillow's decoders let through whatever damage makes them raise
        raise Unreadable(f'{path}: {reason(error)}') from None


def to_rgb(photograph):
    """A PIL image of any mode as RGB; what is transparent shows white. EXIF rotation is not applied.

    The dataset's annotations belong to the pixels as they are stored, whatever the EXIF says.
    """
    if photograph.mode in ('RGBA', 'LA', 'PA') or 'transparency' in photograph.info:
        photograph = photograph.convert('RGBA')
        white = Image.new('RGBA', photograph.size, 'white')
        photograph = Image.alpha_composite(white, photograph)
    elif photograph.mode.startswith('I') and np.max(photograph) > 255:
        # Pillow cuts 16-bit grey off at 255 instead of scaling it.
        photograph = Image.fromarray((np.asarray(photograph) >> 8).clip(0, 255).astype(np.uint8))
    return photograph.convert('RGB')


def read_photograph(path, upright=False):
    """The file's PIL image as RGB, turned as its EXIF says if `upright`; raises Unreadable."""
    with opened_image(path) as file:
        return to_rgb(ImageOps.exif_transpose(file) if upright else file)


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

    def read(self, record, size, warn):
        pet = synthetic_pets.draw_pet(int(record.name.rpartition('_')[2]), self.seed, size)
        return Sample(pet.image, pet.mask, pet.bbox)


def in_strata_order(records, seed):
    """Sort by labels, breed and a hash of name and seed: a random order that no file order changes.

    Whatever is taken from the result at regular intervals is stratified by labels and breed.
    """
    def key(record):
        mixed = hashlib.sha256(f'{seed} {record.name}'.encode()).digest()
        return record.has_mask, record.has_box, record.breed, mixed

    return sorted(records, key=key)


def limited(records, limit):
    """At most `limit` records, taken at regular intervals."""
    if not limit or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def split_records(records, shares):
    """Deal records in strata order to train, val and test; the shares hold in every stretch of them.

    Each record goes to the split that is furthest behind its share, so a stratum is divided to
    within one record and what rounding takes from one stratum is made up in the next.
    """
    splits = {split: [] for split in SPLITS}
    shares = dict(zip(SPLITS, np.divide(shares, sum(shares))))
    for number, record in enumerate(records, 1):
        behind = {split: shares[split] * number - len(splits[split]) for split in SPLITS}
        splits[max(SPLITS, key=behind.get)].append(record)
    return splits


class SplitWriter:
    """Appends samples to the six files of one split; memory does not grow with their number."""

    def __init__(self, paths, size, class_names, stack):
        text = h5py.string_dtype()
        layout = {
            'images': ((size, size, 3), np.uint8),
            'masks': ((size, size, 1), np.uint8),
            'bboxes': ((4,), np.float32),
            'binary': ((1,), np.uint8),
            'breeds': ((1,), np.int16),
            'names': ((), text),
        }
        self.datasets, self.storages = {}, []
        for stem, (shape, dtype) in layout.items():
            file, storage = stack.enter_context(create_h5(paths[stem]))
            self.storages.append(storage)
            chunks = (1, *shape) if len(shape) == 3 else (1024, *shape)
            self.datasets[stem] = file.create_dataset(
                stem, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunks
            )
        self.datasets['breeds'].attrs.create('class_names', class_names, dtype=text)
        self.rows, self.count = [], 0
        self.counts, self.breeds = Counter(), set()

    def add(self, record, sample):
        height, width = sample.image.shape[:2]
        mask, bbox = sample.mask, sample.bbox
        if mask is None:
            mask = np.full((height, width, 1), MASK_UNKNOWN, np.uint8)
        if bbox is None:
            bbox = np.full(4, np.nan, np.float32)
        self.rows.append((sample.image, mask, bbox, [record.species], [record.breed], record.name))
        self.count += 1
        self.counts.update({'masks': sample.mask is not None, 'boxes': sample.bbox is not None,
                            'cats': record.species == 0, 'dogs': record.species == 1})
        self.breeds.add(record.breed)
        if len(self.rows) == BUFFERED:
            self._flush()

    def _flush(self):
        if self.rows:
            for dataset, values in zip(self.datasets.values(), zip(*self.rows)):
                dataset.resize(self.count, axis=0)
                if dataset.dtype.kind == 'O':
                    dataset[-len(values):] = values
                else:
                    dataset[-len(values):] = np.stack(values).astype(dataset.dtype, copy=False)
            self.rows.clear()
        for storage in self.storages:
            storage.check()

    def finish(self, preparation):
        """Write what is left; mark the files with what all files of one preparation share."""
        self._flush()
        for dataset in self.datasets.values():
            dataset.attrs['preparation'] = preparation


def was_prepared(path):
    """Whether this script wrote the HDF5 file."""
    with reading_h5(path) as file:
        return has_checksums(file) and has_own(file, path.stem) and 'preparation' in file[path.stem].attrs


def refuse_to_replace_others(path):
    """Raise InputError if a file stands at `path` that this script did not write."""
    if not os.path.lexists(path):
        return
    try:
        [ours] = in_own_process(30, was_prepared, path)
    except InputError:  # damaged, or no HDF5 file at all
        ours = False
    if not ours:
        raise InputError(f'{path}: was not made by data_prepare.py, or is damaged, and is left alone; choose '
                         'another --out or move it away')


def prepare(source, out, size, shares, seed, limit, options):
    """Write the splits under `out` and print what they hold."""
    records = limited(in_strata_order(source.records, seed), limit)
    splits = split_records(records, shares)
    unreadable = Counter()

    def warn(error, kind='annotation'):
        unreadable[kind] += 1
        tqdm.write(one_line(f'warning: {error}'), file=sys.stderr)

    targets = [Path(out) / split / f'{stem}.h5' for split in SPLITS for stem in STEMS]
    for path in targets:
        refuse_to_replace_others(path)
    writers, digest = [], hashlib.sha256(options.encode())
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        for split in SPLITS:
            stack.enter_context(alone_in(Path(out) / split))
        parts = iter(stack.enter_context(replacing(*targets)))
        files = stack.enter_context(ExitStack())  # closed before they take their places
        bar = stack.enter_context(tqdm(total=len(records), unit='photo', disable=None))
        for split in SPLITS:
            writer = SplitWriter({stem: next(parts) for stem in STEMS}, size, source.class_names, files)
            writers.append(writer)
            for record in sorted(splits[split]):
                interruption.check()
                try:
                    writer.add(record, source.read(record, size, warn))
                except Unreadable as error:
                    warn(error, 'photograph')
                digest.update(f'\n{split} {record.name}'.encode())
                bar.update()
            if not writer.count:
                raise InputError(f'{out}: the {split} split is empty; there are {len(records)} '
                                 f'photographs for the shares {shares}; take more or other shares')
        for writer in writers:
            writer.finish(digest.hexdigest()[:16])
    print(f'{"split":8}{"photographs":>12}{"masks":>8}{"boxes":>8}{"cats":>8}{"dogs":>8}{"breeds":>8}')
    for split, writer in zip(SPLITS, writers):
        counts = ''.join(f'{writer.counts[key]:8}' for key in ('masks', 'boxes', 'cats', 'dogs'))
        print(f'{split:8}{writer.count:12}{counts}{len(writer.breeds):8}')
    for kind, count in sorted(unreadable.items()):
        print(f'unreadable {kind}s left out: {count} (named in the warnings above)')
    print(f'written to {out}; next: python data_rechunk.py --data {out}')


def parse_shares(text):
    """'80-10-10' as three positive numbers."""
    try:
        shares = tuple(float(part) for part in text.split('-'))
    except ValueError:
        shares = ()
    if len(shares) != 3 or not all(0 < share < float('inf') for share in shares):
        raise argparse.ArgumentTypeError(f"'{text}' is not three positive numbers like 80-10-10")
    return shares


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Turn photographs and their annotations into HDF5 splits.',
    )
    parser.add_argument('--source', choices=('oxford', 'synthetic'),
                        help='what to read (default: oxford with --root or --download, else synthetic)')
    parser.add_argument('--root', metavar='DIR', help='folder that holds oxford-iiit-pet/')
    parser.add_argument('--download', action='store_true',
                        help='fetch Oxford-IIIT Pet into --root first (default: datasets)')
    parser.add_argument('--out', default='datasets/data_new', metavar='DIR',
                        help='where the splits go (default: %(default)s)')
    parser.add_argument('--size', type=int, default=256, metavar='PIXELS',
                        help='stored width and height (default: %(default)s)')
    parser.add_argument('--split', type=parse_shares, default='80-10-10', metavar='A-B-C',
                        help='shares of train, val and test (default: %(default)s)')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='of the split and of drawing (default: 0)')
    parser.add_argument('--border', choices=BORDER, default='pet',
                        help="what the trimap's border counts as (default: %(default)s)")
    parser.add_argument('--limit', type=whole_number(1), metavar='N',
                        help='take N photographs, stratified (default: all; synthetic: 1200)')
    args = parser.parse_args(argv)
    if not networks_take(args.size):
        parser.error(f'--size {args.size}: the networks take multiples of 16 from 64 to {LARGEST_SIDE}')

    kind = args.source or ('oxford' if args.root or args.download else 'synthetic')
    if kind == 'synthetic':
        if args.root or args.download:
            parser.error('--root and --download belong to --source oxford')
        source = SyntheticPets(args.limit or 1200, args.seed)
    else:
        root = args.root or 'datasets'
        if args.download:
            download(root)
        source = OxfordPets(root, args.border)
    options = f'{kind} {args.size} {args.split} {args.seed} {args.border} {args.limit}'
    prepare(source, args.out, args.size, args.split, args.seed, args.limit, options)


def download(root):
    """Fetch and unpack the official release (about 800 MB) into `root/oxford-iiit-pet`."""
    from torchvision.datasets import OxfordIIITPet  # here, because importing torch takes seconds

    try:
        OxfordIIITPet(root, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f'{root}: the download failed ({reason(error)}); run the command again') from None


if __name__ == '__main__':
    run_script(main)
