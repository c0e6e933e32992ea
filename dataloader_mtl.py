"""The data of a run: `MTLDataset`, augmentation, and the batches and image size of an epoch.

    from dataloader_mtl import MTLDataset, RandomCropFlip
    dataset = MTLDataset('train', transform=RandomCropFlip(256, 256))
    image, bbox, label, mask = dataset[0]

Run `data_rechunk.py` first. What is not known is 255 in a mask, NaN in a box and -1 as a label; every loss and metric
of `utils.py` leaves it out.
"""

import math
import multiprocessing.queues
import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.ops import box_area
from torchvision.transforms import v2

from support.cli import InputError, ignore_signals, signals_blocked
from support.device import seed_everything
from support.distributed import get_rank, get_world_size
from support.hdf5 import H5_ERRORS, LARGEST_SIDE, MASK_UNKNOWN, SPLITS, SampleReader, fingerprint, is_image_size
from support.splits import limited, read_names, read_split

# Of the training images, per RGB channel, for values in [0, 1].
MEAN = (0.4773, 0.4458, 0.3949)
STD = (0.2280, 0.2255, 0.2280)

VISIBLE_BOX = 0.75  # of a box's area: augmentation drops boxes of which a crop leaves less
LOADING, TRAINING = 0, 1  # what a batch's two random seeds are for


# ---- pixels


def normalise(images):
    """(..., 3, H, W), uint8 0-255 or float 0-1 -> float32, normalised with MEAN and STD."""
    return v2.functional.normalize(v2.functional.to_dtype(images, scale=True), MEAN, STD)


def poor_light(images, share):
    """(N, 3, H, W) float 0-1 -> the same, a random share of them dark, blurred and noisy, as at dusk.

    To 0.2 to 1 of the brightness; as enlarged from 1 / 3 of the size or more; with Gaussian noise of up to 0.05.
    """
    size, images = images.shape[-2:], images.clone()
    for row in torch.nonzero(torch.rand(len(images)) < share).flatten().tolist():
        light, sharpness, noise = torch.rand(3).tolist()
        smaller = [round(side * (1 + 2 * sharpness) / 3) for side in size]
        image = F.interpolate(images[row : row + 1], smaller, mode='bilinear', antialias=True)
        image = F.interpolate(image, size, mode='bilinear')[0] * (0.2 + 0.8 * light)
        images[row] = image + 0.05 * noise * torch.randn_like(image)
    return images


def fill_in(images, keep):
    """Images (N, 3, H, W) with the pixels where `keep` (N, 1, H, W) is 0 filled in smoothly from those around.

    `keep` is float, 0 to 1. From ever coarser means of the pixels kept (pull-push: Gortler et al., SIGGRAPH 1996).
    """
    if min(images.shape[-2:]) > 1:
        shares = F.avg_pool2d(keep, 2, ceil_mode=True)
        means = F.avg_pool2d(images * keep, 2, ceil_mode=True) / shares.clamp(min=1e-6)
        coarse = fill_in(means, (shares > 0).float())
        filled = F.interpolate(coarse, size=images.shape[-2:], mode='bilinear')
        images = torch.lerp(filled, images, keep)
    return images


def without_pets(images, masks, rows):
    """These rows of (N, 3, H, W) images, with the pets of their masks filled in."""
    return fill_in(images[rows], 1 - masks[rows].float()) if len(rows) else images[rows]


def all_known(masks):
    """(N, 1, H, W) uint8 -> (N,) bool on the CPU: whether every pixel of the mask is known."""
    return (masks != MASK_UNKNOWN).flatten(1).all(dim=1).cpu()


def zoom_out(images, boxes, labels, masks, share, several=0, scale=(0.3, 0.8)):
    """Move the pets of a random share of the images, smaller, to the backgrounds of other images of the batch.

    Crops only make a pet larger, and photographs of pets show them large and in the middle. A pet is cut out by its
    mask and placed anywhere (copy and paste: Ghiasi et al., CVPR 2021). The other's own pet is removed by `fill_in`, or
    stays; then the picture has several pets, and neither a box nor a label.

    Args:
        images: (N, 3, H, W) float 0-1.
        boxes: (N, 4) in [0, 1].
        labels: (N,) int64.
        masks: (N, 1, H, W) uint8. Only images with a pet and without unknown pixels are used.
        share: of the images, 0 to 1.
        several: share of these in which the other's pet stays, 0 to 1.
        scale: of the pet, smallest and largest.

    Returns the four, changed, as copies.
    """
    height, width = images.shape[-2:]
    known = all_known(masks)
    has_pet = (masks == 1).flatten(1).any(dim=1).cpu()
    chosen = known & has_pet & known.roll(-1) & (torch.rand(len(images)) < share)
    new_images, new_boxes, new_labels, new_masks = images.clone(), boxes.clone(), labels.clone(), masks.clone()
    rows = torch.nonzero(chosen).flatten()
    others = (rows + 1) % len(images)
    for row, other, empty in zip(rows.tolist(), others.tolist(), without_pets(images, masks, others)):
        stays = several and torch.rand(()) < several
        canvas, mask = (images[other].clone(), masks[other].clone()) if stays else (empty, torch.zeros_like(masks[0]))
        shrink, x, y = torch.rand(3).tolist()
        shrink = scale[0] + (scale[1] - scale[0]) * shrink
        small = round(height * shrink), round(width * shrink)
        top, left = round(y * (height - small[0])), round(x * (width - small[1]))
        layers = torch.cat([images[row : row + 1], masks[row : row + 1]], dim=1)
        *pet, alpha = F.interpolate(layers, small, mode='bilinear', antialias=True)[0]
        window = (slice(None), slice(top, top + small[0]), slice(left, left + small[1]))
        canvas[window] = torch.lerp(canvas[window], torch.stack(pet), alpha)
        mask[window] |= (alpha > 0.5).to(masks.dtype)
        new_images[row], new_masks[row] = canvas, mask
        moved = boxes[row].view(2, 2) * torch.tensor([small[1] / width, small[0] / height])
        new_boxes[row] = (moved + torch.tensor([left / width, top / height])).flatten()
        if stays:
            new_boxes[row], new_labels[row] = torch.nan, -1
    return new_images, new_boxes, new_labels, new_masks


def remove_pets(images, boxes, labels, masks, share):
    """Take the pet out of a random share of the images, so that the network sees some without one.

    Args as `zoom_out`, and labels (N,) int64. Only pets on less than half of the image are removed, by `fill_in`.

    Returns the four, changed, as copies: an empty mask, and no box and label.
    """
    images, boxes, labels, masks = (each.clone() for each in (images, boxes, labels, masks))
    covered = masks.flatten(1).float().mean(dim=1)
    chosen = (torch.rand(len(images)) < share) & all_known(masks) & (covered < 0.5).cpu()
    rows = torch.nonzero(chosen).flatten()
    images[rows] = without_pets(images, masks, rows)
    boxes[rows], labels[rows], masks[rows] = torch.nan, -1, 0
    return images, boxes, labels, masks


class RandomCropFlip:
    """The augmentation of training: a random crop, resized to (height, width), and a horizontal flip.

    The same as v2.RandomResizedCrop((height, width), scale, ratio) and then v2.RandomHorizontalFlip(), for a whole
    batch: what Python does for each image is one crop and resize.

    Args:
        height, width: of the result, in pixels.
        scale: smallest and largest area of the crop, as a share of the image's.
        ratio: smallest and largest ratio of its width to its height.
    """

    def __init__(self, height, width, scale=(0.4, 1.0), ratio=(0.8, 1.25)):
        self.size, self.crop = (height, width), v2.RandomResizedCrop((height, width), scale, ratio)

    def draw(self, images):
        """Parameters for images (N, 3, H, W): crops, an (N, 4) int64 tensor of top, left, height and width, and flips,
        (N,) bool."""
        drawn = [self.crop.make_params([images]) for _ in images]
        crops = torch.tensor([[each[key] for key in ('top', 'left', 'height', 'width')] for each in drawn])
        return crops, torch.rand(len(images)) < 0.5

    def __call__(self, images, boxes, masks):
        """Images (N, 3, H, W), boxes (N, 4) in pixels and masks (N, 1, H, W) -> the same, cropped, resized, flipped.

        Boxes may reach over the border.
        """
        return self.apply(images, boxes, masks, *self.draw(images))

    def apply(self, images, boxes, masks, crops, flips):
        """`__call__` with the parameters that `draw` returns."""
        new_images = images.new_empty((len(images), 3, *self.size))
        new_masks = masks.new_empty((len(images), 1, *self.size))
        for row, (top, left, height, width) in enumerate(crops.tolist()):
            window = (slice(row, row + 1), slice(None), slice(top, top + height), slice(left, left + width))
            new_images[row] = F.interpolate(images[window], self.size, mode='bilinear', antialias=True)[0]
            # The mode 'nearest' would move the mask by half a pixel.
            new_masks[row] = F.interpolate(masks[window], self.size, mode='nearest-exact')[0]
        new_images[flips] = new_images[flips].flip(-1)
        new_masks[flips] = new_masks[flips].flip(-1)
        top, left, height, width = crops.T[..., None].float()
        x = (boxes[:, 0::2] - left) * self.size[1] / width
        y = (boxes[:, 1::2] - top) * self.size[0] / height
        x = torch.where(flips[:, None], self.size[1] - x.flip(1), x)
        return new_images, torch.stack([x, y], dim=2).flatten(1), new_masks


# ---- a split


class Sample(NamedTuple):
    """A sample of MTLDataset; a batch has N in front of each shape."""

    image: torch.Tensor  # (3, H, W) float32, normalised with MEAN and STD
    bbox: torch.Tensor  # (4,) float32: xmin, ymin, xmax, ymax in [0, 1] of width and height, or NaN
    label: torch.Tensor  # () int64 in [0, n_classes), or -1
    mask: torch.Tensor  # (1, H, W) uint8: 1 pet, 0 background, 255 unknown


class MTLDataset(Dataset):
    """One split of the prepared and rechunked data.

    `dataset[i]` is a Sample, `dataset[[i, j, ...]]` a batch of them.

    Args:
        type: the split, 'train', 'val' or 'test'.
        transform: maps what `read` returns to the same, at any size; a RandomCropFlip, for instance.
            Normalisation comes after it.
        root: the folder with train/, val/ and test/.
        zoom_out, remove_pets, poor_light: shares of the images that the functions of these names change after the
            transform, in this order, 0 to 1.
        several: of `zoom_out`.

    Attributes:
        device: where images and masks are augmented and returned: the CPU, or a GPU in a process that may use it.
        folder: Path of the split.
        split: the `support.splits.Split` in it: class names, labels, boxes and which of them are known.

    Raises InputError for files that are missing, damaged, replaced by others or do not belong together. Each
    process opens the files once, on the first read, so a dataset can be pickled, forked and spawned. In the
    meantime the files may be replaced by ones of the same preparation, as data_rechunk.py does.
    """

    def __init__(
        self, type='train', transform=None, root='datasets/data_new', zoom_out=0, several=0, remove_pets=0, poor_light=0
    ):
        self.folder, self.transform = Path(root) / type, transform
        self.zoom_out, self.several, self.remove_pets, self.poor_light = zoom_out, several, remove_pets, poor_light
        self.split = read_split(self.folder)
        self.device = torch.device('cpu')
        self._readers, self._pid = {}, None

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, index):
        if not isinstance(index, list):
            position = range(len(self))[index]  # also a negative one; raises IndexError
            return Sample(*(field[0] for field in self[[position]]))
        images, boxes, masks = self.read(index)
        if self.device.type != 'cpu':
            # As floats: only a CPU resizes bytes with antialiasing.
            images, masks = v2.functional.to_dtype(images.to(self.device), scale=True), masks.to(self.device)
        if self.transform is not None:
            images, boxes, masks = self.transform(images, boxes, masks)
        boxes, labels = self._relative(boxes, *images.shape[-2:]), torch.from_numpy(self.split.labels[index])
        if self.zoom_out or self.remove_pets or self.poor_light:
            images = v2.functional.to_dtype(images, scale=True)
            images, boxes, labels, masks = zoom_out(images, boxes, labels, masks, self.zoom_out, self.several)
            images, boxes, labels, masks = remove_pets(images, boxes, labels, masks, self.remove_pets)
            images = poor_light(images, self.poor_light)
        return Sample(normalise(images), boxes, labels, masks)

    def read(self, indices):
        """As stored: images (N, 3, H, W), uint8 or float32 in [0, 1], boxes (N, 4) float32 in pixels and uint8
        masks (N, 1, H, W)."""
        reader = self._reader('images')
        images = np.empty((len(indices), *reader.shape), reader.dtype)
        masks = np.full((len(indices), *self.split.image_size, 1), MASK_UNKNOWN, np.uint8)
        for row, index in enumerate(indices):
            reader.read(index, images[row])
            if self.split.known['mask'][index]:
                self._reader('masks').read(index, masks[row])
        images, masks = (torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in (images, masks))
        if images.is_floating_point():
            images /= 255  # stored as 0-255 whatever the type; torchvision's floats are 0-1
        return images, torch.from_numpy(self.split.bboxes[indices]), masks

    def _relative(self, boxes, height, width):
        """(N, 4) in pixels -> (N, 4) in [0, 1]; NaN where unknown or where augmentation left too little."""
        boxes = boxes / torch.tensor([width, height, width, height])
        visible = boxes.clamp(0, 1)
        if self.transform is not None:
            visible[~(box_area(visible) >= VISIBLE_BOX * box_area(boxes))] = torch.nan
        return visible

    def with_labels(self, tasks):
        """Indices (list of int) of the samples whose label is known for at least one of `tasks`."""
        return np.flatnonzero(np.any([self.split.known[task] for task in tasks], axis=0)).tolist()

    def __getstate__(self):
        return {**self.__dict__, '_readers': {}, '_pid': None}

    def _reader(self, stem):
        if self._pid != os.getpid():  # first use, or a forked worker, which must not share handles
            self._readers, self._pid = {}, os.getpid()
        if stem not in self._readers:
            path = self.folder / f'{stem}.h5'
            try:
                reader = SampleReader(path)
                same = fingerprint(reader.dataset) == self.split.fingerprints[stem]
            except H5_ERRORS:
                same = False
            if not same:
                raise InputError(f'{path}: was replaced since this run began, or is damaged; start again')
            self._readers[stem] = reader
        return self._readers[stem]


# ---- the splits of a run


def load_splits(root, tasks, limit=None, masks=None):
    """{split: Subset of its MTLDataset with the samples whose label is known for at least one of `tasks`}.

    With `limit`, at most that many samples of each split. With `masks`, only that many masks of the training split
    count as known, the same ones each time. Raises InputError for splits that cannot be used together.
    """
    datasets = {split: MTLDataset(split, root=root) for split in SPLITS}
    for what in 'class_names', 'image_size', 'preparation':  # otherwise an image could be in two of the splits
        if len({str(getattr(dataset.split, what)) for dataset in datasets.values()}) > 1:
            raise InputError(f'{root}: the splits do not belong together, their {what} differs; prepare them again')
    height, width = datasets['train'].split.image_size
    if not is_image_size(height, width):
        raise InputError(
            f'{root}: images of {width} x {height} pixels; the networks take multiples of 16 from 64 to {LARGEST_SIDE}'
        )
    for dataset in datasets.values():  # a class may have no sample in the others
        dataset.split.class_species[:] = datasets['train'].split.class_species
    if masks is not None:  # `read` leaves the others unknown
        known = datasets['train'].split.known['mask']
        known[np.random.default_rng(0).permutation(np.flatnonzero(known))[masks:]] = False
    subsets = {split: Subset(each, limited(each.with_labels(tasks), limit)) for split, each in datasets.items()}
    if not len(subsets['train']):
        raise InputError(f'{datasets["train"].folder}: no sample has a label for {" or ".join(tasks)}')
    return subsets


def count_known(subset):
    """{'images', 'mask', 'class', 'box': number of samples of the Subset that have it}."""
    known = subset.dataset.split.known
    return {'images': len(subset), **{task: int(rows[subset.indices].sum()) for task, rows in known.items()}}


def image_names(subset):
    """For each sample of a Subset: the image's name, its number if the split has no names.h5, and its class or ''."""
    dataset = subset.dataset
    names = read_names(dataset.folder, len(dataset)) or range(len(dataset))
    labels = [dataset.split.labels[index] for index in subset.indices]
    classes = ['' if label < 0 else dataset.split.class_names[label] for label in labels]
    return [names[index] for index in subset.indices], classes


# ---- the batches of an epoch


def training_size(epoch, epochs, image_size, sizes):
    """(height, width) in pixels to train at in `epoch`, from 1, of `epochs`.

    `sizes` are pairs: until this share of the epochs, that share of the stored images' size; rounded down to a
    multiple of 16, at least 64.
    """
    scale = next(scale for end, scale in sizes if (epoch - 1) / epochs < end)
    return tuple(max(64, int(side * scale) // 16 * 16) for side in image_size)


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


def draw_epoch(subset, batch_size, seed, epoch, steps=None):
    """The EpochBatches of all samples of a Subset, shuffled; with `steps`, that many batches of repeated shuffles.

    Raises InputError for batches with fewer images than ranks.
    """
    seed_everything(seed, epoch)
    count = steps * batch_size if steps else len(subset)
    shuffles = [torch.randperm(len(subset)) for _ in range(math.ceil(count / len(subset)))]
    batches = split_batches(torch.cat(shuffles)[:count], batch_size)
    smallest = count // len(batches)
    if smallest < get_world_size():
        raise InputError(
            f'batches of {smallest} images cannot be shared by {get_world_size()} processes; '
            'start fewer, or give a larger --batch-size'
        )
    return EpochBatches(subset, batches, seed, epoch)


# ---- loading


def load_batches(dataset, batches, workers, device):
    """An iterator of `dataset[batch]` for each of `batches`, loaded by this process or by `workers` others."""
    options = {'num_workers': workers, 'worker_init_fn': init_worker, 'batch_size': None}
    pin_memory = device.type == 'cuda' and workers > 0
    with signals_blocked():  # signals do not reach the workers before they ignore them
        return iter(DataLoader(dataset, sampler=batches, pin_memory=pin_memory, **options))


def init_worker(_):
    """What a loading process does first."""
    ignore_signals()
    # A batch that does not fit into shared memory would be dropped and waited for for ever; exit instead.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


@contextmanager
def worker_errors():
    """Within it, the end of a loading process, and any error in one, is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # also raised in the middle of a step, by the DataLoader's signal handler
        if 'DataLoader worker' not in str(error):
            raise
        what = str(error).strip().splitlines()[-1]
        raise InputError(
            f'a process that loads data failed ({what:.200}); --workers 0 loads without such processes, '
            'which need memory and shared memory (/dev/shm)'
        ) from None
