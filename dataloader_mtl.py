"""`MTLDataset`: the HDF5 splits as samples of image, head box, class and mask.

    from dataloader_mtl import MTLDataset, training_transform
    dataset = MTLDataset('train', transform=training_transform(256, 256))
    image, bbox, label, mask = dataset[0]

Needs `data_rechunk.py` to have been run. What is not known of a photograph is NaN in its box and
mask and -1 as its label; every loss and metric of `utils.py` leaves it out.
"""

import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

from data_rechunk import MASK_UNKNOWN, OPTIONAL, SHAPES, InputError, find_dataset, open_h5, reason

# Of the training images, per RGB channel, for values in [0, 1].
MEAN = (0.4773, 0.4458, 0.3949)
STD = (0.2280, 0.2255, 0.2280)

SPECIES = ('cat', 'dog')
SMALLEST_BOX = 0.02  # of the image's side; less than that left in the picture is no head any more


def normalise(image):
    """(..., 3, H, W) uint8 0-255 or float 0-1 -> float32 with the dataset's mean and deviation."""
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, MEAN, STD)


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


class SampleReader:
    """Reads the samples of one dataset of an HDF5 file that stores each as one chunk."""

    def __init__(self, path, key):
        # Without a chunk cache, a chunk goes straight to the array that asks for it.
        file = open_h5(path, rdcc_nbytes=0)
        self.dataset = file[key]
        self.shape, self.dtype = (1, *self.dataset.shape[1:]), self.dataset.dtype
        # Made once: they cost as much as the reading when h5py makes them for each sample.
        self.source, self.target = self.dataset.id.get_space(), h5py.h5s.create_simple(self.shape)

    def read(self, index):
        sample = np.empty(self.shape, self.dtype)
        self.source.select_hyperslab((index, 0, 0, 0), self.shape)
        self.dataset.id.read(self.target, self.source, sample)
        return sample[0]


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
    spawned. Raises InputError for files that are missing, damaged or do not belong together.
    """

    def __init__(self, type='train', transform=None, root='datasets/data_new', label='auto', jitter=0):
        self.folder = Path(root) / type
        self.transform, self.jitter = transform, jitter
        self._files, self._pid = {}, None
        self._check_files()
        species = self._read_labels('binary', len(SPECIES))
        if label not in ('auto', 'breed', 'species'):
            raise ValueError(f"label is '{label}'; expected 'auto', 'breed' or 'species'")
        if label == 'auto':
            label = 'breed' if self._path('breeds').exists() else 'species'
        if label == 'breed':
            self.class_names = self._breed_names()
            self.labels = self._read_labels('breeds', len(self.class_names))
        else:
            self.class_names, self.labels = list(SPECIES), species
        self.bboxes = self._read_boxes()
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
        images, boxes, masks = zip(*(self._transformed(index) for index in indices))
        height, width = images[0].shape[-2:]
        images = v2.functional.to_dtype(torch.stack(images), torch.float32, scale=True)
        if self.jitter:
            images = colour_jitter(images, self.jitter)
        batch = (
            v2.functional.normalize(images, MEAN, STD, inplace=True),
            torch.stack([self._relative_box(each, height, width) for each in boxes]),
            torch.from_numpy(self.labels[indices]),
            torch.full((len(indices), 1, height, width), torch.nan),
        )
        for target, mask in zip(batch[3], masks):
            if len(mask):
                target.copy_(mask).masked_fill_(mask == MASK_UNKNOWN, torch.nan)
        samples = Samples(zip(*batch))
        samples.batch = batch
        return samples

    def _transformed(self, index):
        """The image, boxes and mask of a sample as the transform returns them, as plain tensors."""
        image = torch.from_numpy(self._read('images', index)).permute(2, 0, 1)
        if image.is_floating_point():
            image = image / 255  # stored as 0-255 whatever the type; torchvision's floats are 0-1
        bbox = torch.from_numpy(self.bboxes[index])[None][:int(self.labelled['box'][index])]
        if self.labelled['mask'][index]:
            mask = torch.from_numpy(self._read('masks', index)).permute(2, 0, 1)
        else:
            mask = torch.empty((0, *self.image_size), dtype=torch.uint8)
        if self.transform is None:
            return image, bbox, mask
        boxes = tv_tensors.BoundingBoxes(bbox, format='XYXY', canvas_size=self.image_size)
        parts = self.transform(tv_tensors.Image(image), boxes, tv_tensors.Mask(mask))
        return tuple(part.as_subclass(torch.Tensor) for part in parts)

    def with_labels(self, tasks):
        """Indices (list of int) of the samples that have a label for at least one of `tasks`."""
        return np.flatnonzero(np.any([self.labelled[task] for task in tasks], axis=0)).tolist()

    def __getstate__(self):
        return {**self.__dict__, '_files': {}, '_pid': None}

    # ---- reading

    def _path(self, stem):
        return self.folder / f'{stem}.h5'

    def _read(self, stem, index):
        """One stored image or mask, (H, W, channels), as an array of its own."""
        if self._pid != os.getpid():  # first use, or a forked worker, which must not share handles
            self._files, self._pid = {}, os.getpid()
        if stem not in self._files:
            self._files[stem] = SampleReader(self._path(stem), f'chunked_{stem}')
        try:
            return self._files[stem].read(index)
        except OSError as error:
            raise InputError(f'{self._path(stem)}: sample {index} is damaged ({reason(error)}); '
                             'make the file again') from None

    def _relative_box(self, bbox, height, width):
        """(0 or 1, 4) in pixels -> (4,) in [0, 1], NaN if there is none."""
        bbox = (bbox.float() / torch.tensor([width, height, width, height])).clamp_(0, 1)
        if self.transform is not None:
            bbox = bbox[ops.remove_small_boxes(bbox, SMALLEST_BOX)]
        return bbox[0] if len(bbox) else torch.full((4,), torch.nan)

    # ---- the check at the door

    def _check_files(self):
        """All files open, of the right shapes and lengths, and made by one preparation."""
        lengths, sizes, preparations = {}, {}, {}
        for stem in SHAPES:
            path = self._path(stem)
            if stem in OPTIONAL and not path.exists():
                continue
            with open_h5(path) as file:
                if f'chunked_{stem}' not in file:
                    raise InputError(f"{path}: no 'chunked_{stem}'; run python data_rechunk.py "
                                     f'--data {self.folder.parent}')
                dataset = find_dataset(file, f'chunked_{stem}')
                lengths[stem] = len(dataset)
                preparations[stem] = dataset.attrs.get('preparation')
                if dataset.ndim == 4:
                    sizes[stem] = dataset.shape[1:3]
                if stem == 'images' and dataset.dtype.kind == 'f' and dataset[0].max() <= 1:
                    raise InputError(f'{path}: the first image has no value above 1; '
                                     'images are expected as 0 to 255')
                if stem == 'masks' and dataset.dtype != np.uint8:
                    raise InputError(f"{path}: 'chunked_masks' is {dataset.dtype}, so some value is "
                                     'not 0, 1 or 255; write whole numbers and rechunk again')
        for what, found in ('lengths', lengths), ('sizes', sizes), ('preparations', preparations):
            if len(set(found.values())) > 1:
                listed = ', '.join(f'{stem} {value}' for stem, value in found.items())
                raise InputError(f'{self.folder}: the files do not belong together, their {what} '
                                 f'differ: {listed}; prepare them again')
        self.image_size = tuple(int(side) for side in sizes['images'])
        self.preparation = preparations['images']

    def _read_table(self, stem):
        with open_h5(self._path(stem)) as file:
            return file[f'chunked_{stem}'][()]

    def _read_labels(self, stem, n_classes):
        """(N,) int64 labels, -1 where unknown."""
        values = self._read_table(stem)[:, 0]
        wrong = np.flatnonzero(~((values >= -1) & (values < n_classes) & (values == np.rint(values))))
        if len(wrong):
            raise InputError(f'{self._path(stem)}: sample {wrong[0]} has label {values[wrong[0]]:g}; '
                             f'expected a whole number from 0 to {n_classes - 1}, or -1 for unknown')
        return values.astype(np.int64)

    def _breed_names(self):
        path = self._path('breeds')
        with open_h5(path) as file:
            names = file['chunked_breeds'].attrs.get('class_names')
        if not isinstance(names, np.ndarray) or names.ndim != 1 or not len(names):
            raise InputError(f"{path}: no attribute 'class_names' with the breeds' names; prepare the "
                             'data again, or train with the species by removing the file')
        return [str(name) for name in names]

    def _read_boxes(self):
        """(N, 4) float32 in pixels, NaN where unknown."""
        boxes = self._read_table('bboxes').astype(np.float32)
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
        for index in range(len(self)):
            values = np.bincount(self._read('masks', index).ravel(), minlength=256)
            if values[2:MASK_UNKNOWN].any():
                raise InputError(f'{path}: sample {index} holds {2 + values[2:].nonzero()[0][0]}; a mask '
                                 f'holds 0, 1 and {MASK_UNKNOWN} for unknown')
            known[index] = values[:2].any()
            counts += values
        if counts[MASK_UNKNOWN] and counts[0] and not counts[1]:
            raise InputError(f'{path}: holds 0 and 255 but no 1; 255 means not known, the pet is 1')
        return known
