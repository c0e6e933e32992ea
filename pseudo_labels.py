"""Pseudo-labels: what the network itself finds in the training images that have no mask or no box.

From a share of the epochs on, training takes them as labels (self-training: Lee 2013). The network finds them in
whole images, averaged over flips, with the moving average of its weights, and learns them from crops of other
colours, as in ST++ (Yang et al., CVPR 2022); pixels that it is not sure about stay unknown.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from evaluation import to_device
from models import FlipAveraged
from support.files import replacing
from support.hdf5 import MASK_UNKNOWN, create_h5

SURE = 0.9  # smallest probability of pet or background at which a pixel gets it as its label
BATCH = 32  # images


def epoch_of_labels(epoch, epochs, shares):
    """The epoch, from 1, at whose start the labels that `epoch` trains with are made; None before the first.

    `shares` are those of the `epochs` that are done by then.
    """
    return max((start for start in (1 + math.ceil(share * epochs) for share in shares) if start <= epoch), default=None)


def unlabelled(subset, tasks):
    """Indices (list of int) of the samples of a Subset that lack the mask or the box, if it is one of `tasks`."""
    labelled = [subset.dataset.labelled[task] for task in ('mask', 'box') if task in tasks]
    return [index for index in subset.indices if not all(known[index] for known in labelled)]


@torch.inference_mode()
def write_pseudo_labels(path, epoch, model, subset, device, size, bfloat16=False, before_batch=lambda: None):
    """Write what `model` finds in the images of `unlabelled`, resized to `size`, for MTLDataset.use_pseudo_labels.

    An HDF5 file with masks (N, H, W, 1) uint8, 255 where not sure, and bboxes (N, 4) float32 in pixels, NaN where
    there is none; N is the length of the dataset, not of `subset`.
    """
    dataset = copy.copy(subset.dataset)
    dataset.transform, dataset.jitter, dataset.cutmix = None, 0, 0
    height, width = dataset.image_size
    indices, images = unlabelled(subset, model.tasks), Subset(dataset, range(len(dataset)))
    was_training = model.training
    network = FlipAveraged(model.eval())
    with replacing(path) as part, create_h5(part) as file:
        file.attrs['epoch'] = epoch
        shape = len(dataset), height, width, 1
        options = {'chunks': (1, *shape[1:]), 'compression': 'gzip', 'compression_opts': 1, 'fillvalue': MASK_UNKNOWN}
        masks = file.create_dataset('masks', shape, np.uint8, **options)
        boxes = np.full((len(dataset), 4), np.nan, np.float32)
        for start in range(0, len(indices), BATCH):
            before_batch()
            chosen = indices[start : start + BATCH]
            batch = to_device(images[chosen], device)
            pixels = F.interpolate(batch.image, size, mode='bilinear', antialias=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                outputs = network(pixels)
            if outputs.mask is not None:
                logits = F.interpolate(outputs.mask.float(), (height, width), mode='bilinear')
                for index, mask in zip(chosen, to_labels(logits).cpu().numpy()):
                    masks[index] = mask
            if outputs.bbox is not None:
                boxes[chosen] = outputs.bbox.float().cpu().numpy() * np.float32([width, height, width, height])
        file['bboxes'] = boxes
    model.train(was_training)


def to_labels(logits):
    """Mask logits (N, 1, H, W) -> masks (N, H, W, 1) uint8: 1 pet, 0 background, 255 not sure."""
    probability = logits[:, 0, ..., None].sigmoid()
    labels = (probability > 0.5).to(torch.uint8)
    return labels.masked_fill_((probability - 0.5).abs() < SURE - 0.5, MASK_UNKNOWN)
