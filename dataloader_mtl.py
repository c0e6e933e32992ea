"""`MTLDataset`: the HDF5 splits as samples of image, head box, class and mask.

    from dataloader_mtl import MTLDataset, training_transform
    dataset = MTLDataset('train', transform=training_transform(256, 256))
    image, bbox, label, mask = dataset[0]

Needs `data_rechunk.py` to have been run. What is not known of a photograph is NaN in its box and
mask and -1 as its label; every loss and metric of `utils.py` leaves it out.
"""

import os
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

from data_rechunk import (H5_ERRORS, MASK_UNKNOWN, OPTIONAL, SHAPES, InputError, are_names, find_dataset, has_own,
                          in_own_process, is_rechunked, open_h5, reading_h5, reason)

# Of the training images, per RGB channel, for values in [0, 1].
MEAN = (0.4773, 0.4458, 0.3949)
STD = (0.2280, 0.2255, 0.2280)

SPECIES = ('cat', 'dog')
SMALLEST_BOX = 0.02  # of the image's side; less than that left in the picture is no head any more


def normalise(images):
    """(..., 3, H, W) uint8 0-255 or float 0-1 -> float32 with the dataset's mean and deviation.

    The layout in memory stays what it is, channels first or last.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    scale, offset = 1 / std, -mean / std
    if not images.is_floating_point():
        images, scale = images.float(), scale / 255
    pixels = images.movedim(-3, -1)
    if not pixels.is_contiguous():
        return torch.addcmul(offset[:, None, None], images, scale[:, None, None])
    # Along whole rows of R, G, B, R, G, B: arithmetic that meets the 3 channels last is four times slower.
    scale, offset = scale.repeat(pixels.shape[-2]), offset.repeat(pixels.shape[-2])
    return torch.addcmul(offset, pixels.flatten(-2), scale).view_as(pixels).movedim(-1, -3)


def denormalise(image):
    """What `normalise` did, undone: float (3, H, W) -> uint8."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def colour_jitter(images, strength):
    """(N, 3, H, W) float -> the same with a random brightness, contrast and saturation for each image.

    The factors are uniform in 1 +- strength. It is v2.ColorJitter in the order of its arguments and
    without clamping: then the three are linear in the pixels, one 3 x 3 matrix and one offset for each
    image, and a batch takes a pass where v2.ColorJitter takes seven of each image.
    """
    brightness, contrast, saturation = torch.empty(3, len(images), 1, 1).uniform_(1 - strength, 1 + strength)
    grey = torch.tensor([[0.2989, 0.587, 0.114]])  # the weights of v2.functional.rgb_to_grayscale
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * (grey @ images.mean(dim=(2, 3))[..., None])
    return torch.baddbmm(offset, matrix, images.flatten(2)).view_as(images)


def training_transform(height, width):
    """Joint augmentation of (image, boxes, mask) tv_tensors: flip, scale and crop."""
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomResizedCrop((height, width), scale=(0.4, 1.0), ratio=(0.8, 1.25), antialias=True),
    ])


class Samples(list):
    """Samples that are the rows of `batch`, a tuple of four tensors."""


def collate(samples):
    """A DataLoader's collate_fn that takes a batch of MTLDataset as it is, instead of copying it."""
    return samples.batch if isinstance(samples, Samples) else default_collate(samples)


def identity(dataset):
    """What a dataset and its copies have in common: shape, type and preparation, or else the file itself."""
    preparation = dataset.attrs.get('preparation')
    if preparation is None:
        status = os.fstat(dataset.file.id.get_vfd_handle())
        preparation = status.st_dev, status.st_ino, status.st_mtime_ns
    return dataset.shape, dataset.dtype, str(preparation)


class Inspected(NamedTuple):
    """What a file of a split holds, but for the samples of images and masks."""
    length: int
    size: tuple | None  # (height, width) of images and masks
    preparation: str | None
    identity: tuple
    table: np.ndarray | None  # of boxes and labels
    class_names: list | None  # of breeds, if they can be printed


def inspected(path):
    """The Inspected of a file; raises InputError unless it is as data_rechunk.py stores its kind."""
    stem = path.stem
    rechunk = f'run python data_rechunk.py --data {path.parent.parent}'
    with reading_h5(path) as file:
        if not has_own(file, f'chunked_{stem}'):
            raise InputError(f"{path}: no 'chunked_{stem}'; {rechunk}")
        dataset = find_dataset(file, f'chunked_{stem}')
        if not is_rechunked(file, stem):
            raise InputError(f'{path}: not as data_rechunk.py stores it; {rechunk}')
        kind, preparation, names = dataset.dtype, dataset.attrs.get('preparation'), None
        if stem == 'images' and kind.kind == 'f' and dataset[0].max() <= 1:
            raise InputError(f'{path}: the first image has no value above 1; images are expected as 0 to 255')
        if stem == 'images' and kind.kind != 'f' and kind != np.uint8:
            raise InputError(f"{path}: 'chunked_images' is {kind}, so some value is not from 0 to 255; write "
                             'such values and rechunk again')
        if stem == 'masks' and kind != np.uint8:
            raise InputError(f"{path}: 'chunked_masks' is {kind}, so some value is not 0, 1 or 255; write whole "
                             'numbers and rechunk again')
        if stem == 'breeds':
            names = dataset.attrs.get('class_names')
            names = names.tolist() if isinstance(names, np.ndarray) else names
        return Inspected(
            length=len(dataset),
            size=tuple(map(int, dataset.shape[1:3])) if dataset.ndim == 4 else None,
            preparation=preparation and str(preparation),
            identity=identity(dataset),
            table=dataset[()] if dataset.ndim == 2 else None,
            class_names=names if are_names(names) else None,
        )


class SampleReader:
    """Reads samples of one dataset of an HDF5 file that stores each as one chunk."""

    def __init__(self, path, key):
        # Without a chunk cache, a chunk goes straight to the array that asks for it.
        self.dataset = open_h5(path, rdcc_nbytes=0)[key]
        self.shape, self.dtype = self.dataset.shape[1:], self.dataset.dtype
        if self.dtype.kind == 'f':
            self.dtype = np.dtype(np.float32)  # HDF5 converts while it reads
        # Made once: for each sample, they cost as much as the reading.
        self.source, self.target = self.dataset.id.get_space(), h5py.h5s.create_simple(self.shape)
        # Without filters (checksums are one) and conversion, the chunk as it is stored is the sample.
        filters = self.dataset.id.get_create_plist().get_nfilters()
        self.as_stored = not filters and self.dtype == self.dataset.dtype

    def read(self, index, out):
        """Read a sample into `out`, a contiguous array of the reader's shape and dtype."""
        if self.as_stored:
            self.dataset.id.read_direct_chunk((index, 0, 0, 0), out=out.reshape(-1).view(np.uint8))
        else:
            self.source.select_hyperslab((index, 0, 0, 0), (1, *self.shape))
            self.dataset.id.read(self.target, self.source, out)


class MTLDataset(Dataset):
    """One split of the prepared and rechunked data.

    Args:
        type: the split, 'train', 'val' or 'test'.
        transform: called with (Image (3,H,W) uint8, BoundingBoxes (1,4) in pixels, Mask (1,H,W) uint8
            with 255 for pixels not known) and returning the same; a box or mask that is not known has
            0 in place of 1. `training_transform` is one. Normalisation does not depend on it.
        jitter: strength of `colour_jitter` after the transform.
        root: the folder with train/, val/ and test/.
        label: 'breed' (breeds.h5), 'species' (binary.h5) or 'auto': the breed where it is there.

    A sample is the tuple
        image: float32 (3, H, W), normalised with MEAN and STD.
        bbox: float32 (4,), xmin, ymin, xmax, ymax in [0, 1] of the image's width and height, or NaN.
        label: int64 scalar in [0, n_classes), or -1.
        mask: float32 (1, H, W), 1 pet, 0 background, NaN unknown.

    Attributes:
        class_names: list of str, the name of each label.
        image_size: (height, width) of the stored images.
        preparation: str that all files of one preparation share, None for files made elsewhere.
        labelled: dict of bool arrays (N,), for 'class', 'mask' and 'box' whether the sample has it.

    Files are opened once in each process that reads them, so the dataset can be pickled, forked and
    spawned. They may be replaced in the meantime by files of the same preparation, as data_rechunk.py
    does. Raises InputError for files that are missing, damaged, replaced by others or do not belong
    together.
    """

    def __init__(self, type='train', transform=None, root='datasets/data_new', label='auto', jitter=0):
        self.folder = Path(root) / type
        self.transform, self.jitter = transform, jitter
        self._files, self._pid = {}, None
        found = self._check_files(needed=('breeds',) if label == 'breed' else ())
        species = self._checked_labels('binary', found['binary'].table, len(SPECIES))
        if label not in ('auto', 'breed', 'species'):
            raise ValueError(f"label is '{label}'; expected 'auto', 'breed' or 'species'")
        if label == 'auto':
            label = 'breed' if 'breeds' in found else 'species'
        if label == 'breed':
            self.class_names = found['breeds'].class_names
            if self.class_names is None:
                raise InputError(f"{self._path('breeds')}: no attribute 'class_names' with the breeds' names, each "
                                 'of 1 to 100 characters that can be printed; prepare the data again, or train '
                                 'with the species by removing the file')
            self.labels = self._checked_labels('breeds', found['breeds'].table, len(self.class_names))
        else:
            self.class_names, self.labels = list(SPECIES), species
        self.bboxes = self._checked_boxes(found['bboxes'].table)
        self.labelled = {
            'class': self.labels >= 0,
            'mask': self._masks_known(),
            'box': ~np.isnan(self.bboxes).any(axis=1),
        }

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices):
        """The samples at `indices`, which a DataLoader asks for at once, normalised together."""
        images, boxes, masks = (self._stored if self.transform is None else self._transformed)(indices)
        if self.jitter:
            images = colour_jitter(v2.functional.to_dtype(images, torch.float32, scale=True), self.jitter)
        unknown = masks == MASK_UNKNOWN
        batch = (
            normalise(images),
            self._relative(boxes, *images.shape[-2:]),
            torch.from_numpy(self.labels[indices]),
            masks.float().masked_fill_(unknown, torch.nan),
        )
        samples = Samples(zip(*batch))
        samples.batch = batch
        return samples

    def _stored(self, indices):
        """Images (N, 3, H, W), boxes (N, 4) in pixels and uint8 masks (N, 1, H, W) as they are stored."""
        images = self._new('images', len(indices))
        masks = np.full((len(indices), *self.image_size, 1), MASK_UNKNOWN, np.uint8)
        for row, index in enumerate(indices):
            self._read('images', index, images[row])
            if self.labelled['mask'][index]:
                self._read('masks', index, masks[row])
        images, masks = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in (images, masks))
        if images.is_floating_point():
            wrong = ~images.isfinite().flatten(1).all(dim=1)
            if wrong.any():
                raise InputError(f'{self._path("images")}: sample {indices[int(wrong.nonzero()[0])]} holds values '
                                 'that are no numbers; make the file again')
            images /= 255  # stored as 0-255 whatever the type; torchvision's floats are 0-1
        return images, torch.from_numpy(self.bboxes[indices]), masks

    def _transformed(self, indices):
        """The same after the transform of each sample."""
        parts = []
        for index in indices:
            image, bbox, mask = self._stored([index])
            known = {task: int(self.labelled[task][index]) for task in ('box', 'mask')}
            parts.append(self.transform(
                tv_tensors.Image(image[0]),
                tv_tensors.BoundingBoxes(bbox[:known['box']], format='XYXY', canvas_size=self.image_size),
                tv_tensors.Mask(mask[0, :known['mask']]),
            ))
        images, boxes, masks = ([part.as_subclass(torch.Tensor) for part in each] for each in zip(*parts))
        images = torch.stack(images)
        all_boxes = torch.full((len(parts), 4), torch.nan)
        all_masks = torch.full((len(parts), 1, *images.shape[-2:]), MASK_UNKNOWN, dtype=torch.uint8)
        for row, (bbox, mask) in enumerate(zip(boxes, masks)):
            all_boxes[row, :] = bbox[0] if len(bbox) else torch.nan
            all_masks[row, :len(mask)] = mask
        return images, all_boxes, all_masks

    def with_labels(self, tasks):
        """Indices (list of int) of the samples that have a label for at least one of `tasks`."""
        return np.flatnonzero(np.any([self.labelled[task] for task in tasks], axis=0)).tolist()

    def __getstate__(self):
        return {**self.__dict__, '_files': {}, '_pid': None}

    # ---- reading

    def _path(self, stem):
        return self.folder / f'{stem}.h5'

    def _reader(self, stem):
        if self._pid != os.getpid():  # first use, or a forked worker, which must not share handles
            self._files, self._pid = {}, os.getpid()
        if stem not in self._files:
            try:
                reader = SampleReader(self._path(stem), f'chunked_{stem}')
                same = identity(reader.dataset) == self._identities[stem]
            except H5_ERRORS:
                same = False
            if not same:
                raise InputError(f'{self._path(stem)}: was replaced by other data while it was in use; start again')
            self._files[stem] = reader
        return self._files[stem]

    def _new(self, stem, count):
        """An empty array for `count` samples."""
        reader = self._reader(stem)
        return np.empty((count, *reader.shape), reader.dtype)

    def _read(self, stem, index, out):
        try:
            self._reader(stem).read(index, out)
        except H5_ERRORS as error:
            raise InputError(f'{self._path(stem)}: sample {index} is damaged ({reason(error)}); '
                             'make the file again') from None

    def _relative(self, boxes, height, width):
        """(N, 4) in pixels -> (N, 4) in [0, 1]; NaN where there is none or too little is left of it."""
        boxes = (boxes / torch.tensor([width, height, width, height])).clamp_(0, 1)
        if self.transform is not None:
            kept = torch.full_like(boxes, torch.nan)
            large = ops.remove_small_boxes(boxes, SMALLEST_BOX)
            kept[large] = boxes[large]
            return kept
        return boxes

    # ---- the check at the door

    def _check_files(self, needed):
        """{stem: Inspected}; raises InputError unless the files are sound and belong together.

        Those in `needed` have to be there though they are OPTIONAL.
        """
        stems = [stem for stem in SHAPES if stem not in OPTIONAL or stem in needed or self._path(stem).exists()]
        found = dict(zip(stems, in_own_process(30, inspected, *map(self._path, stems))))
        for what, values in (
            ('lengths', {stem: each.length for stem, each in found.items()}),
            ('sizes', {stem: found[stem].size for stem in ('images', 'masks')}),
            ('preparations', {stem: each.preparation for stem, each in found.items()}),
        ):
            if len(set(values.values())) > 1:
                listed = ', '.join(f'{stem} {value}' for stem, value in values.items())
                raise InputError(f'{self.folder}: the files do not belong together, their {what} '
                                 f'differ: {listed}; prepare them again')
        self._identities = {stem: each.identity for stem, each in found.items()}
        self.image_size, self.preparation = found['images'].size, found['images'].preparation
        return found

    def _checked_labels(self, stem, table, n_classes):
        """(N,) int64 labels, -1 where unknown."""
        values = table[:, 0]
        wrong = np.flatnonzero(~((values >= -1) & (values < n_classes) & (values == np.rint(values))))
        if len(wrong):
            raise InputError(f'{self._path(stem)}: sample {wrong[0]} has label {float(values[wrong[0]]):g}; '
                             f'expected a whole number from 0 to {n_classes - 1}, or -1 for unknown')
        return values.astype(np.int64)

    def _checked_boxes(self, table):
        """(N, 4) float32 in pixels, NaN where unknown."""
        boxes = table.astype(np.float32)
        height, width = self.image_size
        known = ~np.isnan(boxes).any(axis=1)
        # A pixel of slack: a box may be given by its first and last pixel, or rounded.
        low, high = (boxes >= -1).all(axis=1), (boxes <= (width + 1, height + 1) * 2).all(axis=1)
        wrong = np.flatnonzero(known & ~(low & high & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)))
        if len(wrong):
            raise InputError(f'{self._path("bboxes")}: sample {wrong[0]} has the box '
                             f'{boxes[wrong[0]].tolist()}; expected xmin < xmax and ymin < ymax within '
                             f'an image of {width} x {height} pixels')
        boxes[~known] = np.nan
        return boxes

    def _masks_known(self):
        """(N,) bool: whether any pixel of the mask is known."""
        path = self._path('masks')
        known, counts = np.empty(len(self), bool), np.zeros(256, np.int64)
        mask = self._new('masks', 1)[0]
        for index in range(len(self)):
            self._read('masks', index, mask)
            values = np.bincount(mask.ravel(), minlength=256)
            if values[2:MASK_UNKNOWN].any():
                raise InputError(f'{path}: sample {index} holds {2 + values[2:].nonzero()[0][0]}; a mask '
                                 f'holds 0, 1 and {MASK_UNKNOWN} for unknown')
            known[index] = values[:2].any()
            counts += values
        if counts[MASK_UNKNOWN] and counts[0] and not counts[1]:
            raise InputError(f'{path}: holds 0 and 255 but no 1; 255 means not known, the pet is 1')
        return known
