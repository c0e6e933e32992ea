"""What a trained model finds in photographs: the pet's mask, its breed and the box of its head.

from prediction import cutout, load_model, predict
model = load_model('mtl_model.pt')
prediction = predict(model, 'cat.jpg')
print(prediction.breed, prediction.probability, prediction.bbox, prediction.mask.mean())
cutout('cat.jpg', prediction).save('cutout.png')
"""

import os
from collections.abc import Iterable
from io import IOBase
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from dataloader_mtl import normalise
from models import FlipAveraged, load_model  # noqa: F401, load_model for those who import predict
from support.cli import InputError
from support.files import UnreadableFile, read_image, to_rgb  # noqa: F401, UnreadableFile for those who catch it

LIKELIEST = 5  # breeds of a Prediction
EXPECTED = (
    'expected a path, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W), or a list or an '
    'iterator of these'
)


class Prediction(NamedTuple):
    """What `predict` finds in an image of H x W pixels; what the model has no task for is None."""

    breed: str | None  # the likeliest
    probability: float | None  # of that breed, in [0, 1]
    breeds: list | None  # the five likeliest, (breed, probability), the likeliest first
    species: str | None  # 'cat' or 'dog'; None, too, if the model file does not know those of its breeds
    species_probability: float | None  # the sum over its breeds, in [0, 1]
    bbox: tuple | None  # xmin, ymin, xmax, ymax of the head in pixels, float
    mask: np.ndarray | None  # (H, W) bool, True where the pet is
    mask_probability: np.ndarray | None  # (H, W) float32 in [0, 1]; the mask is where it is above 0.5


def predict(model, images, flip=False, batch_size=4, device=None):
    """The Prediction of a model from `load_model` for an image, or for each of many.

    Args:
        images: an image: a path, a PIL image of any mode, a uint8 array (H, W, 3) RGB or (H, W) grey, or a uint8
            tensor (3, H, W), of any size. Or a list or tuple of images, or an iterator of them.
        flip: average over the image and its mirror image: a box IoU higher by about 0.015, in twice the time. The
            default is the fast way, as masks and breeds hardly gain.
        batch_size: images that go through the network together; more pays on a GPU alone.
        device: where to move the model first, such as 'cuda'; None leaves it where it is.

    Returns a Prediction for an image, a list of them in order for a list, and an iterator of them for an iterator,
    which holds one batch of images, at the size of the model, at any time. Paths and PIL images are rotated as their
    EXIF says, as viewers show them; arrays and tensors are taken as they are.

    `model` is in evaluation mode, as `load_model` leaves it. Raises ValueError for anything else, UnreadableFile for a
    file that is no image, and InputError for a model that gives numbers that are not finite; for an image of a batch,
    before the first prediction of the batch.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size {batch_size}; expected 1 or more')
    if device is not None:
        model.to(device)
    network = FlipAveraged(model) if flip else model
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, torch.Tensor)):
        return next(iterate(network, model, [images], 1))
    if not isinstance(images, Iterable) or isinstance(images, (bytes, dict, set, IOBase)):
        refuse(images)
    predictions = iterate(network, model, images, batch_size)
    return list(predictions) if isinstance(images, (list, tuple)) else predictions


def iterate(network, model, images, batch_size):
    """Yield a Prediction of `network`, `model` or its FlipAveraged, for each of `images`."""
    images = iter(images)
    height, width = model.image_size
    while True:
        batch, sizes = [], []
        for image in map(to_image, islice(images, batch_size)):
            batch.append(pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)))
            sizes.append(image.size)
        if not batch:
            return
        device = next(model.parameters()).device
        pixels = torch.stack(batch).to(device).contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        with torch.inference_mode():
            outputs = network(normalise(pixels))
        for row, size in enumerate(sizes):
            yield make_prediction(model, *(each if each is None else each[row] for each in outputs), size)


def to_image(image):
    """An image as `predict` takes it -> a PIL image, RGB and upright."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, upright=True)
    if isinstance(image, Image.Image) and all(image.size):
        return to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 3 and image.dtype == torch.uint8:
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3:
            return Image.fromarray(np.ascontiguousarray(image)).convert('RGB')
    refuse(image)


def refuse(value):
    """Raise the ValueError for what is no image."""
    found = type(value).__name__
    if isinstance(value, (np.ndarray, torch.Tensor)):
        found += f' {tuple(value.shape)} of {value.dtype}'
    elif isinstance(value, Image.Image):
        found += f' of {value.width} x {value.height} pixels'
    raise ValueError(f'{EXPECTED}; found {found}')


@torch.inference_mode()
def make_prediction(model, label, mask, bbox, size):
    """The Prediction from one image's Outputs and its (width, height)."""
    if not all(output.isfinite().all() for output in (label, mask, bbox) if output is not None):
        raise InputError('the model gives no finite numbers for this photograph; train it again')
    fields = dict.fromkeys(Prediction._fields)
    if label is not None:
        probabilities = label.double().softmax(dim=0).tolist()
        ranked = sorted(zip(model.class_names, probabilities), key=lambda each: -each[1])
        fields['breed'], fields['probability'] = ranked[0]
        fields['breeds'] = ranked[:LIKELIEST]
        sums = {}
        for species, probability in zip(model.class_species, probabilities):
            sums[species] = sums.get(species, 0) + probability
        sums.pop(None, None)
        if sums:
            fields['species'] = max(sums, key=sums.get)
            fields['species_probability'] = min(1.0, sums[fields['species']])
    if bbox is not None:
        fields['bbox'] = tuple((bbox.double().cpu() * torch.tensor([*size, *size])).tolist())
    if mask is not None:
        logits = F.interpolate(mask[None], size=size[::-1], mode='bilinear', align_corners=False)[0, 0]
        fields['mask_probability'] = logits.sigmoid().float().cpu().numpy()
        fields['mask'] = fields['mask_probability'] > 0.5
    return Prediction(**fields)


def cutout(image, prediction):
    """The pet on transparent ground: a PIL image, RGBA, of the size of `image`, as `predict` takes one.

    Opaque where the mask's probability is above 3/4, transparent where it is below 1/4, in between in proportion.
    Raises ValueError for the prediction of an image of another size or of a network without masks.
    """
    picture = to_image(image)
    found = np.shape(prediction.mask_probability)
    if found != picture.size[::-1]:
        raise ValueError(f'a mask of the shape {found} does not belong to an image of {picture.size[::-1]}')
    alpha = (prediction.mask_probability * 2 - 0.5).clip(0, 1) * 255
    picture.putalpha(Image.fromarray(alpha.round().astype(np.uint8)))
    return picture
