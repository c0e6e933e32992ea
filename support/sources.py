"""Where images and annotations come from: Oxford-IIIT Pet, drawn pets, or a folder of one's own. Imports no torch.

A source has `records`, `class_names`, `read(record, size)` and, except for drawn pets, `thumbnail(record)`. Reading
fills `unreadable`, with a message for each annotation, and `petless`, with the names of the images of Oxford-IIIT Pet
whose masks are all background.
"""

import csv
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import synthetic_pets
from support.cli import InputError, are_names, one_line, reason
from support.files import require_file
from support.hdf5 import MASK_UNKNOWN
from support.images import IMAGE_SUFFIXES, UnreadableFile, find_images, on_white, open_image, read_photograph, to_srgb
from support.splits import SPECIES

BORDER = {'pet': 1, 'background': 0, 'ignore': MASK_UNKNOWN}
FILES = {'image': 'images/{}.jpg', 'trimap': 'annotations/trimaps/{}.png', 'box': 'annotations/xmls/{}.xml'}
THUMBNAIL = (16, 16)


class Record(NamedTuple):
    """What is known of an image before it is read; enough to choose its split."""

    name: str
    species: int  # 0 cat, 1 dog, -1 unknown
    breed: int  # -1 unknown
    has_mask: bool
    has_box: bool


def warn(error):
    tqdm.write(one_line(f'warning: {error}'), file=sys.stderr)


class Photographs:
    """What the sources of photographs share: reading an image with its annotations."""

    hint = ''  # what to do if no image can be read

    def __init__(self):
        self.unreadable, self.petless = set(), set()

    def thumbnail(self, record):
        """The record's image in grey at the size THUMBNAIL; raises UnreadableFile."""
        image = self._read_image(record.name, small=True)
        return np.asarray(image.convert('L').resize(THUMBNAIL, Image.Resampling.BOX))

    def read(self, record, size):
        """The record's image (size, size, 3) uint8 RGB, mask (size, size, 1) uint8 and box (4,) float32.

        The mask is 1 pet, 0 background and 255 unknown, the box xmin, ymin, xmax and ymax in pixels, NaN unknown.
        Raises UnreadableFile for the image.
        """
        image = self._read_image(record.name)
        mask, bbox = np.full((size, size, 1), MASK_UNKNOWN, np.uint8), np.full(4, np.nan, np.float32)
        try:
            mask = self._read_mask(record.name, size, image.size) if record.has_mask else mask
        except UnreadableFile as error:
            self._leave_out(error)
        try:
            bbox = self._read_box(record.name, size, image.size) if record.has_box else bbox
        except UnreadableFile as error:
            self._leave_out(error)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)), mask, bbox

    def _leave_out(self, error):
        if str(error) not in self.unreadable:  # by another fold
            warn(error)
        self.unreadable.add(str(error))


def scaled_box(where, corners, extent, size):
    """A box in pixels of an image of `extent` (width, height) -> (4,) float32 in pixels of size x size, clipped to it.

    Raises UnreadableFile, which starts with `where`, for a box without an area inside the image.
    """
    extent = [*extent] * 2
    with np.errstate(all='ignore'):
        bbox = np.clip(np.divide(corners, extent), 0, 1)
    if not np.isfinite([*corners, *extent]).all() or min(extent) <= 0 or not (bbox[:2] < bbox[2:]).all():
        raise UnreadableFile(f'{where}: the box {corners} has no area inside an image of {extent[0]:g} x {extent[1]:g}')
    return (bbox * size).astype(np.float32)


# ---- Oxford-IIIT Pet


class OxfordPets(Photographs):
    """The Oxford-IIIT Pet dataset in its official layout: `root/oxford-iiit-pet`, or `root` itself."""

    hint = 'each NAME in list.txt needs an image images/NAME.jpg'

    def __init__(self, root, border):
        super().__init__()
        root, folder = Path(root), Path(root) / 'oxford-iiit-pet'
        self.folder = root if (root / 'annotations').exists() and not folder.exists() else folder
        # What is stored for the trimap's 1 pet, 2 background and 3 border.
        self.trimap_values = np.array([MASK_UNKNOWN, 1, 0, BORDER[border]], np.uint8)
        self.records, self.class_names = self._read_list('list.txt', '--download fetches the dataset')

    def official_parts(self):
        """(set of the records in trainval.txt, set of those in test.txt); raises InputError if they do not fit."""
        hint = 'take list.txt, trainval.txt and test.txt from one release, or choose shares for --split'
        folder = self.folder / 'annotations'
        trainval, test = (set(self._read_list(file, hint)[0]) for file in ('trainval.txt', 'test.txt'))
        unlisted, shared = (trainval | test) - set(self.records), trainval & test
        if unlisted:
            raise InputError(f"{folder}: '{min(unlisted).name}' is not in list.txt, or of another class there; {hint}")
        if shared:
            raise InputError(f"{folder}: '{min(shared).name}' is in both trainval.txt and test.txt; {hint}")
        return trainval, test

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
                if not 1 <= class_id <= 37 or species not in (1, 2):
                    raise ValueError
            except ValueError:
                raise InputError(
                    f"{where}: '{line}' is not NAME CLASS-ID SPECIES BREED-ID, with classes 1 to 37 and species 1 or 2"
                ) from None
            breed_name = name.rpartition('_')[0]
            plain = Path(name).name == name and name.isprintable() and len(name) <= 200 and are_names([breed_name])
            if name in records or not plain:
                raise InputError(f"{where}: '{name}' is listed twice or is not a file name like Abyssinian_12")
            if class_names.setdefault(class_id, breed_name) != breed_name:
                raise InputError(f"{where}: class {class_id} is '{class_names[class_id]}' and '{breed_name}'")
            has_mask, has_box = (self._path(kind, name).exists() for kind in ('trimap', 'box'))
            records[name] = Record(name, species - 1, class_id - 1, has_mask, has_box)
        if not records:
            raise InputError(f'{path}: lists no image; {hint}')
        names = [class_names.get(i, f'class {i}') for i in range(1, max(class_names, default=0) + 1)]
        return list(records.values()), names

    def _path(self, kind, name):
        return self.folder / FILES[kind].format(name)

    def _read_image(self, name, small=False):
        with open_image(self._path('image', name)) as image:  # annotated as it is stored, EXIF or not
            if small:
                image.draft('L', (64, 64))  # a JPEG is decoded in grey, at a quarter or so of its size
            return on_white(to_srgb(image))

    def _read_mask(self, name, size, _):
        path = self._path('trimap', name)
        with open_image(path) as trimap:
            values = np.asarray(trimap.resize((size, size), Image.Resampling.NEAREST))
        found = np.unique(values)
        if values.ndim != 2 or values.dtype.kind not in 'iu' or not np.isin(found, (1, 2, 3)).all():
            raise UnreadableFile(f'{path}: values {found[:5].tolist()}; a trimap holds 1, 2 and 3')
        mask = self.trimap_values[values][..., None]
        if not (mask == 1).any():  # but every image of the dataset shows a pet
            self.petless.add(name)
            mask[:] = MASK_UNKNOWN
        return mask

    def _read_box(self, name, size, _):
        path = self._path('box', name)
        try:
            root = ElementTree.parse(path).getroot()
            # A missing element reads 'none', which is no number.
            corners = [float(root.findtext(f'object/bndbox/{key}', 'none')) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            # The size that was annotated; the image on disk may have another.
            extent = [float(root.findtext(f'size/{key}', 'none')) for key in ('width', 'height')]
        except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
            raise UnreadableFile(f'{path}: no <bndbox> and <size> in numbers ({reason(error)})') from None
        return scaled_box(path, corners, extent, size)


# ---- images of one's own

LABEL_COLUMNS = ('image', 'class', 'species', 'xmin', 'ymin', 'xmax', 'ymax')
ASPECT = 0.02  # by which a mask's width / height may differ from its image's


class OwnImages(Photographs):
    """Any images, `images`, and if given their masks, another folder, and labels, a CSV file (docs/data.md).

    An image is named by its path below `images`, without suffix. Prints the masks and labels that have no image.
    Raises InputError for ambiguous labels or values of masks, and for two images of one name.
    """

    hint = 'take images that can be decoded'

    def __init__(self, images, masks, labels, border):
        super().__init__()
        self.images = find_named(images, IMAGE_SUFFIXES)
        self.masks, self.mask_values = {}, None
        if masks:
            self.masks = self._known(find_named(masks, ('.png',)), masks, 'masks')
            self.mask_values = self._find_mask_values(masks, BORDER[border])
        self.rows = self._known(self._read_labels(Path(labels)), labels, 'labels') if labels else {}
        self.class_names = sorted({row['class'] for row in self.rows.values()} - {''})
        if self.class_names and not are_names(self.class_names):
            raise InputError(f"{labels}: the classes' names must have 1 to 100 printable characters")
        numbers = {name: number for number, name in enumerate(self.class_names or SPECIES)}
        self.records = []
        for name in self.images:
            row = self.rows.get(name, dict.fromkeys(LABEL_COLUMNS, ''))
            species = SPECIES.index(row['species']) if row['species'] else -1
            label = row['class'] if self.class_names else row['species']
            self.records.append(Record(name, species, numbers.get(label, -1), name in self.masks, row['xmin'] != ''))
        self.class_names = self.class_names or list(SPECIES)

    def _known(self, found, where, what):
        """The entries of {name: ...} that have an image; prints the names of the others. Raises InputError for none."""
        lost = sorted(set(found) - set(self.images))
        if len(lost) == len(found):
            example = f'{next(iter(lost), "no name")} and {next(iter(self.images))}'
            raise InputError(
                f'{where}: none of the {len(found)} {what} has the name of an image ({example}); it is the path below '
                'the folder, without suffix'
            )
        if lost:
            listed = ', '.join(lost[:10]) + (', ...' if len(lost) > 10 else '')
            print(one_line(f'{where}: {what} without an image: {len(lost)} ({listed})'))
        return {name: value for name, value in found.items() if name in self.images}

    def _find_mask_values(self, folder, border):
        """What is stored for each value of the masks, (256,) uint8; masks that cannot be read are left out."""
        found, example = set(), {}
        for name, path in tqdm([*self.masks.items()], 'masks', unit='mask', disable=None):
            try:
                values = np.unique(read_values(path)).tolist()
            except UnreadableFile as error:
                self._leave_out(error)
                del self.masks[name]
                continue
            found.update(values)
            example.update({value: path for value in values if value not in example})
        if not self.masks:
            raise InputError(f'{folder}: none of its masks can be used (see the warnings above)')
        stored = np.full(256, MASK_UNKNOWN, np.uint8)
        if found <= {0, 255}:
            stored[0], stored[255] = 0, 1
        elif found <= {0, 1, 255}:
            stored[0], stored[1] = 0, 1
        elif found <= {1, 2, 3}:
            stored[1:4] = 1, 0, border
        else:
            listed = ', '.join(f'{value} ({example[value].name})' for value in sorted(found)[:8])
            raise InputError(
                f'{folder}: holds the values {listed}; masks are 0 and 1, 0 and 255, or trimaps of 1, 2 and 3'
            )
        return stored

    def _read_labels(self, path):
        """{name: row of LABEL_COLUMNS, each a text, '' unknown}."""
        require_file(path, 'a CSV file with a column image is expected')
        try:
            with open(path, newline='', encoding='utf-8-sig') as file:
                lines = list(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f'{path}: not a CSV file in UTF-8 ({reason(error)})') from None
        header = [column.strip().lower() for column in lines[0]] if lines else []
        if 'image' not in header or len(set(header)) < len(header):
            hint = '; save it with commas' if re.search('[;\t]', ''.join(header)) else ''
            raise InputError(
                f"{path}: its first line is {header}; expected a column 'image', and each column once{hint}"
            )
        unused = [column for column in header if column not in LABEL_COLUMNS]
        if unused:
            print(one_line(f'{path}: columns that are not used: {", ".join(unused)}'))
        rows = {}
        for number, line in enumerate(lines[1:], 2):
            if not any(cell.strip() for cell in line):
                continue
            row = dict.fromkeys(LABEL_COLUMNS, '') | {key: cell.strip() for key, cell in zip(header, line)}
            row['species'] = row['species'].lower()
            name, where = Path(row['image']).as_posix(), f'{path}, line {number}'
            if name not in self.images and name.lower().endswith(IMAGE_SUFFIXES):
                name = name.rpartition('.')[0]
            if name in rows or not row['image']:
                raise InputError(f"{where}: image '{row['image']}' is empty or listed twice")
            if row['species'] not in ('', *SPECIES):
                raise InputError(f"{where}: species '{row['species']}'; expected cat, dog or nothing")
            corners = [row[key] for key in LABEL_COLUMNS[3:]]
            if any(corners):
                try:
                    row['box'] = [float(corner) for corner in corners]
                except ValueError:
                    raise InputError(f'{where}: the box {corners} is not four numbers in pixels, or nothing') from None
            rows[name] = row
        return rows

    def _read_image(self, name, small=False):
        return on_white(read_photograph(self.images[name]))

    def _read_mask(self, name, size, extent):
        path = self.masks[name]
        values = self.mask_values[read_values(path)]
        height, width = values.shape
        if abs(width * extent[1] / (height * extent[0]) - 1) > ASPECT:
            raise UnreadableFile(f'{path}: is {width} x {height} and its image {extent[0]} x {extent[1]}')
        return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST))[..., None]

    def _read_box(self, name, size, extent):
        box = self.rows[name]['box']
        if min(box) < -1 or any(high > side + 1 for high, side in zip(box[2:], extent)):  # a pixel is rounding
            raise UnreadableFile(f'box of {name}: {box} reaches outside its image of {extent[0]} x {extent[1]}')
        return scaled_box(f'box of {name}', box, extent, size)


def find_named(folder, suffixes):
    """{path below `folder` without suffix: Path} of `find_images`; raises InputError for names that are there twice."""
    folder, found = Path(folder), {}
    for path in find_images(folder, suffixes=suffixes):
        name = path.relative_to(folder).with_suffix('').as_posix()
        if name in found:
            raise InputError(f'{path}: has the same name as {found[name].name}; rename one of them')
        if not name.isprintable() or len(name) > 200:
            raise InputError(f'{path}: its name is too long or cannot be printed; rename it')
        found[name] = path
    return found


def read_values(path):
    """The values of a mask of any mode with one channel, (H, W) uint8; raises UnreadableFile."""
    with open_image(path) as image:
        values = np.asarray(image)
    if values.ndim == 3:  # of grey stored as colours; without what is transparent
        colours = values[..., : 3 if values.shape[2] >= 3 else 1]
        values = colours[..., 0]
        if (colours != values[..., None]).any():
            raise UnreadableFile(f'{path}: holds colours; a mask has one channel or a palette')
    if values.max() > 255 or values.min() < 0:
        raise UnreadableFile(f'{path}: holds values up to {values.max()}; a mask has 8 bits')
    return values.astype(np.uint8)


# ---- drawn pets


class SyntheticPets:
    """`count` drawn pets with every label."""

    unreadable = petless = ()

    def __init__(self, count, seed):
        self.seed = seed
        self.class_names = [breed.name for breed in synthetic_pets.BREEDS]
        self.records = []
        for index in range(count):
            breed = index % len(self.class_names)
            name = f'{self.class_names[breed]}_{index}'
            species = synthetic_pets.BREEDS[breed].species
            self.records.append(Record(name, species, breed, has_mask=True, has_box=True))

    def read(self, record, size):
        number = int(record.name.rpartition('_')[2])
        return synthetic_pets.draw_pet(number, self.seed, size)
