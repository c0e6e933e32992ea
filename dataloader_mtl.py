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
from torchvision import tv_tensors
from torchvision.transforms import v2

from support.cli import InputError, ignore_signals, signals_blocked
from support.device import seed_everything
from support.distributed import get_rank, get_world_size
from support.hdf5 import H5_ERRORS, LARGEST_SIDE, MASK_UNKNOWN, SPLITS, SampleReader, fingerprint, is_image_size
from support.splits import limited, open_split

# Of the training images, per RGB channel, for values in [0, 1].
MEAN = (0.4773, 0.4458, 0.3949)
STD = (0.2280, 0.2255, 0.2280)

SMALLEST_BOX = 0.02  # of the image's side: augmentation drops boxes of which less is left
JITTER = 0.3  # strength of `colour_jitter` in training
MASK_REPEATS = 3  # how often a masked image comes in an epoch where masks are rare
LOADING, TRAINING = 0, 1  # what a batch's two random seeds are for


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
        transform: called with (Image (3, H, W), uint8, or float32 in [0, 1] if stored as float; BoundingBoxes
            (1, 4) in pixels; Mask (1, H, W) uint8 with 255 for unknown pixels) and returns the same; an unknown
            box or mask has 0 in place of the leading 1. `training_transform` makes one. Normalisation comes
            after it.
        root: the folder with train/, val/ and test/.
        label: 'breed' (breeds.h5), 'species' (binary.h5) or 'auto': the breed if there is a breeds.h5.
        jitter: strength of `colour_jitter` after the transform, in [0, 1).

    Attributes:
        folder: Path of the split.
        class_names: list of str, the name of each label.
        labels: (N,) int64 array, -1 unknown.
        bboxes: (N, 4) float32 array in pixels of the stored images, NaN unknown.
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
        split = open_split(self.folder, label)
        self.image_size, self.preparation, self._fingerprints = split[:3]
        self.class_names, self.labels, self.bboxes = split.class_names, split.labels, split.bboxes
        self.labelled = {'class': split.labels >= 0, 'mask': split.has_mask, 'box': ~np.isnan(split.bboxes).any(axis=1)}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if not isinstance(index, list):
            position = range(len(self))[index]  # also a negative one; raises IndexError
            return Sample(*(field[0] for field in self[[position]]))
        images, boxes, masks = self._read_batch(index) if self.transform is None else self._transform_batch(index)
        if self.jitter:
            images = colour_jitter(v2.functional.to_dtype(images, torch.float32, scale=True), self.jitter)
        return Sample(
            image=normalise(images),
            bbox=self._relative(boxes, *images.shape[-2:]),
            label=torch.from_numpy(self.labels[index]),
            mask=masks.float().masked_fill_(masks == MASK_UNKNOWN, torch.nan),
        )

    def _read_batch(self, indices):
        """As stored: images (N, 3, H, W), uint8 or float32 in [0, 1], boxes (N, 4) float32 in pixels and uint8
        masks (N, 1, H, W)."""
        reader = self._reader('images')
        images = np.empty((len(indices), *reader.shape), reader.dtype)
        masks = np.full((len(indices), *self.image_size, 1), MASK_UNKNOWN, np.uint8)
        for row, index in enumerate(indices):
            reader.read(index, images[row])
            if self.labelled['mask'][index]:
                self._reader('masks').read(index, masks[row])
        images, masks = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in (images, masks))
        if images.is_floating_point():
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
            all_boxes[row : row + len(bbox)] = bbox
            all_masks[row, : len(mask)] = mask
        return images, all_boxes, all_masks

    def _relative(self, boxes, height, width):
        """(N, 4) in pixels -> (N, 4) in [0, 1]; NaN where unknown or where augmentation left too little."""
        boxes = (boxes / torch.tensor([width, height, width, height])).clamp_(0, 1)
        if self.transform is not None:
            boxes[(boxes[:, 2:] - boxes[:, :2] < SMALLEST_BOX).any(dim=1)] = torch.nan
        return boxes

    def with_labels(self, tasks):
        """Indices (list of int) of the samples that have a label for at least one of `tasks`."""
        return np.flatnonzero(np.any([self.labelled[task] for task in tasks], axis=0)).tolist()

    def __getstate__(self):
        return {**self.__dict__, '_readers': {}, '_pid': None}

    def _reader(self, stem):
        if self._pid != os.getpid():  # first use, or a forked worker, which must not share handles
            self._readers, self._pid = {}, os.getpid()
        if stem not in self._readers:
            path = self.folder / f'{stem}.h5'
            try:
                reader = SampleReader(path)
                same = fingerprint(reader.dataset) == self._fingerprints[stem]
            except H5_ERRORS:
                same = False
            if not same:
                raise InputError(f'{path}: holds other data than when it was opened, or is damaged; start again')
            self._readers[stem] = reader
        return self._readers[stem]


# ---- the splits of a run


def load_splits(root, tasks, limit=None):
    """{split: Subset of its MTLDataset with the samples that have a label for at least one of `tasks`}.

    With `limit`, at most that many samples of each split. Raises InputError for splits that cannot be used
    together.
    """
    datasets = {split: MTLDataset(split, root=root) for split in SPLITS}
    for what in 'class_names', 'image_size', 'preparation':  # otherwise an image could be in two of the splits
        if len({str(getattr(dataset, what)) for dataset in datasets.values()}) > 1:
            raise InputError(f'{root}: the splits do not belong together, their {what} differs; prepare them again')
    height, width = datasets['train'].image_size
    if not is_image_size(height, width):
        raise InputError(
            f'{root}: images of {width} x {height} pixels; the networks take multiples of 16 from 64 to {LARGEST_SIDE}'
        )
    subsets = {split: Subset(each, limited(each.with_labels(tasks), limit)) for split, each in datasets.items()}
    if not len(subsets['train']):
        raise InputError(f'{datasets["train"].folder}: no sample has a label for {" or ".join(tasks)}')
    return subsets


def count_labels(subset):
    """{'images', 'mask', 'class', 'box': number of samples of the Subset that have it}."""
    labelled = subset.dataset.labelled
    return {'images': len(subset), **{task: int(known[subset.indices].sum()) for task, known in labelled.items()}}


# ---- the batches of an epoch


def training_size(epoch, epochs, image_size):
    """(height, width) in pixels to train at in `epoch`, from 1, of `epochs`.

    Half of the stored images' size for the first 65 % of the epochs, three quarters for the next 30 %, then
    all of it, which needs 20 epochs or more; rounded down to a multiple of 16, at least 64. Small images show
    most of what there is to learn at a quarter of the cost (progressive resizing: Howard, fast.ai on DAWNBench,
    2018). Evaluation is at the stored size.
    """
    done = (epoch - 1) / epochs
    scale = 2 / 4 if done < 0.65 else 3 / 4 if done < 0.95 else 1
    return tuple(max(64, int(side * scale) // 16 * 16) for side in image_size)


def epoch_positions(subset):
    """The positions in the Subset that an epoch draws from, (M,) int64.

    If under a third of the images have masks, masked images are oversampled 3x; otherwise most of the time would
    go to images that teach the decoder nothing.
    """
    positions = torch.arange(len(subset))
    has_mask = torch.from_numpy(subset.dataset.labelled['mask'][subset.indices])
    if 0 < MASK_REPEATS * has_mask.sum() < len(subset):
        positions = torch.cat([positions, positions[has_mask].repeat(MASK_REPEATS - 1)])
    return positions


def steps_per_epoch(positions, batch_size):
    """The number of batches of an epoch; raises InputError for batches with fewer images than ranks."""
    steps = math.ceil(len(positions) / batch_size)
    if len(positions) // steps < get_world_size():
        raise InputError(
            f'batches of {len(positions) // steps} images cannot be shared by {get_world_size()} processes; '
            'start fewer, or give a larger --batch-size'
        )
    return steps


def split_batches(order, batch_size):
    """This rank's share of each batch of `order`: a list of lists of positions.

    `order` must be the same on every rank. A batch has at most `batch_size` positions over all ranks, and the
    sizes of batches differ by one at most; a rank gets every world_size-th position of a batch.
    """
    batches = torch.as_tensor(order).tensor_split(max(1, math.ceil(len(order) / batch_size)))
    return [batch[get_rank() :: get_world_size()].tolist() for batch in batches]


class EpochBatches(Dataset):
    """This rank's batches of an epoch; item i is batch i, a Sample with N in front.

    Each batch is drawn from a seed of its own, so neither the number of workers nor a stop changes it.
    """

    def __init__(self, subset, batches, seed, epoch):
        self.subset, self.batches, self.key = subset, batches, (seed, epoch)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        self.seed(number, LOADING)
        return self.subset[self.batches[number]]

    def seed(self, number, use):
        """Seed this process for batch `number`; `use` is LOADING or TRAINING."""
        seed_everything(*self.key, number + 1, 2 * get_rank() + use)

    def count(self, steps):
        """The number of samples in the first `steps` batches."""
        return sum(map(len, self.batches[:steps]))

    def indices(self, number):
        """The samples of batch `number`, as indices in the split's files."""
        return [self.subset.indices[position] for position in self.batches[number]]

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


def evaluation_loader(dataset, batch_size, workers):
    """A DataLoader of this rank's share of an MTLDataset or a Subset of one, in order."""
    batches = [batch for batch in split_batches(range(len(dataset)), batch_size) if batch]
    return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=ignore_signals)


def iter_loader(loader):
    """`iter(loader)`; signals do not reach its workers before they ignore them."""
    with signals_blocked():
        return iter(loader)
