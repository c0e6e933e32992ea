"""The data of a run: `MTLDataset`, augmentation, and the batches and image size of an epoch.

    from dataloader_mtl import MTLDataset, training_transform
    dataset = MTLDataset('train', transform=training_transform(256, 256))
    image, bbox, label, mask = dataset[0]

Run `data_rechunk.py` first. An unknown box or mask is NaN and an unknown label -1; every loss and metric of
`utils.py` leaves them out.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

from support.cli import InputError, ignore_signals, reason, signals_blocked
from support.device import seed_everything
from support.distributed import get_rank, get_world_size
from support.hdf5 import (
    H5_ERRORS,
    LARGEST_SIDE,
    MASK_UNKNOWN,
    SPLITS,
    SampleReader,
    check_split,
    fingerprint,
    is_image_size,
    read_class_names,
)

# Of the training images, per RGB channel, for values in [0, 1].
MEAN = (0.4773, 0.4458, 0.3949)
STD = (0.2280, 0.2255, 0.2280)

SPECIES = ('cat', 'dog')
SMALLEST_BOX = 0.02  # of the image's side: augmentation drops boxes of which less is left
JITTER = 0.3  # strength of `colour_jitter` in training
MASK_REPEATS = 3  # how often a masked image comes in an epoch where masks are rare


# ---- pixels


def normalise(images):
    """(..., 3, H, W), uint8 0-255 or float 0-1 -> float32, normalised with MEAN and STD.

    Keeps the memory format, channels first or last.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    scale, offset = 1 / std, -mean / std
    if not images.is_floating_point():
        images, scale = images.float(), scale / 255
    pixels = images.movedim(-3, -1)
    if not pixels.is_contiguous():
        return torch.addcmul(offset[:, None, None], images, scale[:, None, None])
    # Along whole rows of R, G, B, R, G, B: broadcasting over 3 channels, last, is four times slower.
    scale, offset = scale.repeat(pixels.shape[-2]), offset.repeat(pixels.shape[-2])
    return torch.addcmul(offset, pixels.flatten(-2), scale).view_as(pixels).movedim(-1, -3)


def denormalise(image):
    """The inverse of `normalise`: float (3, H, W) -> uint8 (3, H, W)."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def colour_jitter(images, strength):
    """(N, 3, H, W) float -> the same with a random brightness, contrast and saturation for each image.

    The factors are uniform in 1 - strength to 1 + strength. It is v2.ColorJitter without hue, in this fixed
    order and without clamping. The three are then linear in the pixels: a 3 x 3 matrix and an offset for each
    image, one pass over the batch where v2.ColorJitter takes seven over each image.
    """
    brightness, contrast, saturation = torch.empty(3, len(images), 1, 1).uniform_(1 - strength, 1 + strength)
    grey = torch.tensor([[0.2989, 0.587, 0.114]])  # the weights of v2.functional.rgb_to_grayscale
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * (grey @ images.mean(dim=(2, 3))[..., None])
    return torch.baddbmm(offset, matrix, images.flatten(2)).view_as(images)


def training_transform(height, width):
    """The augmentation of (image, boxes, mask) tv_tensors: flip, scale and crop to height x width."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop((height, width), scale=(0.4, 1.0), ratio=(0.8, 1.25), antialias=True),
        ]
    )


# ---- a split


class Sample(NamedTuple):
    """A sample of MTLDataset; a batch has N in front of each shape."""

    image: torch.Tensor  # (3, H, W) float32, normalised with MEAN and STD
    bbox: torch.Tensor  # (4,) float32: xmin, ymin, xmax, ymax in [0, 1] of width and height, or NaN
    label: torch.Tensor  # () int64 in [0, n_classes), or -1
    mask: torch.Tensor  # (1, H, W) float32: 1 pet, 0 background, NaN unknown


class MTLDataset(Dataset):
    """One split of the prepared and rechunked data.

    `dataset[i]` is a Sample, `dataset[[i, j, ...]]` a batch of them.

    Args:
        type: the split, 'train', 'val' or 'test'.
        transform: called with (Image (3, H, W) uint8, BoundingBoxes (1, 4) in pixels, Mask (1, H, W) uint8
            with 255 for unknown pixels) and returns the same; an unknown box or mask has 0 in place of the
            leading 1. `training_transform` makes one. Normalisation comes after it.
        jitter: strength of `colour_jitter` after the transform.
        root: the folder with train/, val/ and test/.
        label: 'breed' (breeds.h5), 'species' (binary.h5) or 'auto': the breed if there is a breeds.h5.

    Attributes:
        class_names: list of str, the name of each label.
        image_size: (height, width) of the stored images.
        preparation: str that all files of one preparation share, None for files made elsewhere.
        labelled: {'class', 'mask', 'box': (N,) bool array, whether the sample has it}.

    Raises InputError for files that are missing, damaged, replaced by others or do not belong together. Each
    process opens the files once, on the first read, so a dataset can be pickled, forked and spawned. In the
    meantime the files may be replaced by ones of the same preparation, as data_rechunk.py does.
    """

    def __init__(self, type='train', transform=None, root='datasets/data_new', label='auto', jitter=0):
        if label not in ('auto', 'breed', 'species'):
            raise ValueError(f"label is '{label}'; expected 'auto', 'breed' or 'species'")
        self.folder = Path(root) / type
        self.transform, self.jitter = transform, jitter
        self._readers, self._pid = {}, None
        files = check_split(self.folder, needed=('breeds',) if label == 'breed' else ())
        self.image_size, self.preparation = files.image_size, files.preparation
        self._fingerprints = files.fingerprints
        species = self._check_labels('binary', files.tables['binary'], len(SPECIES))
        if label == 'species' or label == 'auto' and 'breeds' not in files.tables:
            self.class_names, self.labels = list(SPECIES), species
        else:
            self.class_names = read_class_names(self._path('breeds'))
            self.labels = self._check_labels('breeds', files.tables['breeds'], len(self.class_names))
        self.bboxes = self._check_boxes(files.tables['bboxes'])
        self.labelled = {
            'class': self.labels >= 0,
            'mask': self._find_masks(),
            'box': ~np.isnan(self.bboxes).any(axis=1),
        }

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if not isinstance(index, list):
            return Sample(*(part[0] for part in self[[range(len(self))[index]]]))
        images, boxes, masks = (self._read_batch if self.transform is None else self._transform_batch)(index)
        if self.jitter:
            images = colour_jitter(v2.functional.to_dtype(images, torch.float32, scale=True), self.jitter)
        return Sample(
            image=normalise(images),
            bbox=self._relative(boxes, *images.shape[-2:]),
            label=torch.from_numpy(self.labels[index]),
            mask=masks.float().masked_fill_(masks == MASK_UNKNOWN, torch.nan),
        )

    def _read_batch(self, indices):
        """As stored: images (N, 3, H, W), boxes (N, 4) in pixels and uint8 masks (N, 1, H, W)."""
        reader = self._reader('images')
        images = np.empty((len(indices), *reader.shape), reader.dtype)
        masks = np.full((len(indices), *self.image_size, 1), MASK_UNKNOWN, np.uint8)
        for row, index in enumerate(indices):
            self._read('images', index, images[row])
            if self.labelled['mask'][index]:
                self._read('masks', index, masks[row])
        images, masks = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in (images, masks))
        if images.is_floating_point():
            wrong = ~images.isfinite().flatten(1).all(dim=1)
            if wrong.any():
                raise InputError(
                    f'{self._path("images")}: sample {indices[int(wrong.nonzero()[0])]} holds NaN or infinity; '
                    'make the file again'
                )
            images /= 255  # stored as 0-255 whatever the type; torchvision's floats are 0-1
        return images, torch.from_numpy(self.bboxes[indices]), masks

    def _transform_batch(self, indices):
        """The same after the transform of each sample."""
        samples = []
        for index in indices:
            image, bbox, mask = self._read_batch([index])
            known = {task: int(self.labelled[task][index]) for task in ('box', 'mask')}
            samples.append(
                self.transform(
                    tv_tensors.Image(image[0]),
                    tv_tensors.BoundingBoxes(bbox[: known['box']], format='XYXY', canvas_size=self.image_size),
                    tv_tensors.Mask(mask[0, : known['mask']]),
                )
            )
        images, boxes, masks = ([part.as_subclass(torch.Tensor) for part in each] for each in zip(*samples))
        images = torch.stack(images)
        all_boxes = torch.full((len(samples), 4), torch.nan)
        all_masks = torch.full((len(samples), 1, *images.shape[-2:]), MASK_UNKNOWN, dtype=torch.uint8)
        for row, (bbox, mask) in enumerate(zip(boxes, masks)):
            all_boxes[row, :] = bbox[0] if len(bbox) else torch.nan
            all_masks[row, : len(mask)] = mask
        return images, all_boxes, all_masks

    def _relative(self, boxes, height, width):
        """(N, 4) in pixels -> (N, 4) in [0, 1]; NaN where unknown or where augmentation left too little."""
        boxes = (boxes / torch.tensor([width, height, width, height])).clamp_(0, 1)
        if self.transform is not None:
            kept = torch.full_like(boxes, torch.nan)
            large = ops.remove_small_boxes(boxes, SMALLEST_BOX)
            kept[large] = boxes[large]
            return kept
        return boxes

    def with_labels(self, tasks):
        """Indices (list of int) of the samples that have a label for at least one of `tasks`."""
        return np.flatnonzero(np.any([self.labelled[task] for task in tasks], axis=0)).tolist()

    # ---- reading

    def __getstate__(self):
        return {**self.__dict__, '_readers': {}, '_pid': None}

    def _path(self, stem):
        return self.folder / f'{stem}.h5'

    def _reader(self, stem):
        if self._pid != os.getpid():  # first use, or a forked worker, which must not share handles
            self._readers, self._pid = {}, os.getpid()
        if stem not in self._readers:
            try:
                reader = SampleReader(self._path(stem), f'chunked_{stem}')
                same = fingerprint(reader.dataset) == self._fingerprints[stem]
            except H5_ERRORS:
                same = False
            if not same:
                raise InputError(f'{self._path(stem)}: was replaced by other data while in use; start again')
            self._readers[stem] = reader
        return self._readers[stem]

    def _read(self, stem, index, out):
        try:
            self._reader(stem).read(index, out)
        except H5_ERRORS as error:
            raise InputError(
                f'{self._path(stem)}: sample {index} is damaged ({reason(error)}); make the file again'
            ) from None

    # ---- checks of the values

    def _check_labels(self, stem, table, n_classes):
        """(N, 1) numbers -> (N,) int64 labels, -1 where unknown."""
        values = table[:, 0]
        wrong = np.flatnonzero(~((values >= -1) & (values < n_classes) & (values == np.rint(values))))
        if len(wrong):
            raise InputError(
                f'{self._path(stem)}: sample {wrong[0]} has label {float(values[wrong[0]]):g}; '
                f'expected a whole number from 0 to {n_classes - 1}, or -1 for unknown'
            )
        return values.astype(np.int64)

    def _check_boxes(self, table):
        """(N, 4) numbers -> (N, 4) float32 in pixels, NaN where unknown."""
        boxes = table.astype(np.float32)
        height, width = self.image_size
        known = ~np.isnan(boxes).any(axis=1)
        # A pixel of slack: a box may be given by its first and last pixel, or rounded.
        low, high = (boxes >= -1).all(axis=1), (boxes <= (width + 1, height + 1) * 2).all(axis=1)
        wrong = np.flatnonzero(known & ~(low & high & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)))
        if len(wrong):
            raise InputError(
                f'{self._path("bboxes")}: sample {wrong[0]} has the box {boxes[wrong[0]].tolist()}; expected '
                f'xmin < xmax and ymin < ymax within an image of {width} x {height} pixels'
            )
        boxes[~known] = np.nan
        return boxes

    def _find_masks(self):
        """(N,) bool: whether any pixel of the mask is known."""
        path, reader = self._path('masks'), self._reader('masks')
        known, counts = np.empty(len(self), bool), np.zeros(256, np.int64)
        mask = np.empty(reader.shape, reader.dtype)
        for index in range(len(self)):
            self._read('masks', index, mask)
            values = np.bincount(mask.ravel(), minlength=256)
            if values[2:MASK_UNKNOWN].any():
                raise InputError(
                    f'{path}: sample {index} holds {2 + values[2:].nonzero()[0][0]}; a mask holds 0, 1 and '
                    f'{MASK_UNKNOWN} for unknown'
                )
            known[index] = values[:2].any()
            counts += values
        if counts[MASK_UNKNOWN] and counts[0] and not counts[1]:
            raise InputError(f'{path}: holds 0 and 255 but no 1; 255 means unknown, the pet is 1')
        return known


# ---- the splits of a run


def load_splits(root, tasks, limit=None):
    """{split: Subset of its MTLDataset with the samples that have a label for at least one of `tasks`}.

    With `limit`, at most that many samples of each split. Raises InputError for splits that cannot be used
    together.
    """
    datasets = {split: MTLDataset(split, root=root) for split in SPLITS}
    check_same_preparation(datasets.values())
    height, width = datasets['train'].image_size
    if not is_image_size(height, width):
        raise InputError(
            f'{root}: images of {width} x {height} pixels; the networks take multiples of 16 from 64 to {LARGEST_SIDE}'
        )
    parts = {}
    for split, dataset in datasets.items():
        indices = dataset.with_labels(tasks)
        count = min(len(indices), limit or len(indices))
        parts[split] = Subset(dataset, [indices[i * len(indices) // count] for i in range(count)])
    if not len(parts['train']):
        raise InputError(f'{datasets["train"].folder}: no sample has a label for {" or ".join(tasks)}')
    return parts


def check_same_preparation(datasets):
    """Refuse splits of different classes, sizes or preparations: an image could be in two of them."""
    first, *others = datasets
    for what in 'class_names', 'image_size', 'preparation':
        if any(getattr(other, what) != getattr(first, what) for other in others):
            raise InputError(
                f'{first.folder.parent}: the splits do not belong together, their {what} differs; prepare them again'
            )


def count_labels(part):
    """{'images', 'mask', 'class', 'box': number of samples of the Subset that have it}."""
    labelled = part.dataset.labelled
    return {'images': len(part), **{task: int(known[part.indices].sum()) for task, known in labelled.items()}}


# ---- the batches of an epoch


def training_size(epoch, epochs, image_size):
    """(height, width) to train at in `epoch` of `epochs`: half of the stored images' size for 65 % of the
    epochs, three quarters for 30 %, then all of it.

    Small images show most of what there is to learn at a quarter of the cost (progressive resizing: Howard,
    fast.ai on DAWNBench, 2018). Evaluation is at the stored size.
    """
    done = (epoch - 1) / epochs
    scale = 2 / 4 if done < 0.65 else 3 / 4 if done < 0.95 else 1
    return tuple(max(64, int(side * scale) // 16 * 16) for side in image_size)


def epoch_positions(part):
    """The positions in the Subset `part` that an epoch draws from, (M,) int64.

    If under a third of the images have masks, masked images are oversampled 3x; or most of the time would go
    to images that teach the decoder nothing.
    """
    positions = torch.arange(len(part))
    has_mask = torch.from_numpy(part.dataset.labelled['mask'][part.indices])
    if 0 < MASK_REPEATS * has_mask.sum() < len(part):
        positions = torch.cat([positions, positions[has_mask].repeat(MASK_REPEATS - 1)])
    return positions


def split_batches(order, batch_size):
    """This rank's shares of the batches of `order`, the same positions on every rank: a list of lists.

    A batch has at most `batch_size` positions over all ranks; sizes differ by one at most.
    """
    batches = torch.as_tensor(order).tensor_split(max(1, math.ceil(len(order) / batch_size)))
    return [batch[get_rank() :: get_world_size()].tolist() for batch in batches]


class EpochBatches(Dataset):
    """This rank's batches of an epoch; item i is batch i, a Sample with N in front.

    Each batch is drawn from a seed of its own, so neither the number of workers nor a stop changes it.
    """

    def __init__(self, part, batches, seed, epoch):
        self.part, self.batches, self.key = part, batches, (seed, epoch)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        self.seed(number, 0)
        return self.part[self.batches[number]]

    def seed(self, number, use):
        """Seed this process for loading (`use` 0) or training on (`use` 1) batch `number`."""
        seed_everything(*self.key, number + 1, 2 * get_rank() + use)

    def indices(self, number):
        """The samples of batch `number`, as indices in the split's files."""
        return [self.part.indices[position] for position in self.batches[number]]

    def loader(self, start, workers, device):
        """A DataLoader of the batches from `start` on."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == 'cuda',
        )


def evaluation_loader(part, batch_size, workers):
    """A DataLoader of this rank's share of a Subset or MTLDataset, in order."""
    batches = [batch for batch in split_batches(range(len(part)), batch_size) if batch]
    return DataLoader(part, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=ignore_signals)


def iter_loader(loader):
    """`iter(loader)`, with signals held off from its workers until they ignore them."""
    with signals_blocked():
        return iter(loader)
