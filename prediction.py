"""What a trained model finds in photographs: the pet's mask, its breed and the box of its head.

from prediction import cutout, load_model, predict
model = load_model()
prediction = predict(model, 'cat.jpg')
print(prediction.breed, prediction.probability, prediction.bbox, prediction.mask.mean())
cutout('cat.jpg', prediction).save('cutout.png')
"""

import os
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torchvision.transforms.v2.functional import pil_to_tensor

from dataloader_mtl import normalise
from models import FlipAveraged, load_model
from support.cli import InputError
from support.images import UnreadableFile, on_white, read_photograph, reading, to_srgb, upright
from support.splits import SPECIES
from utils import likeliest_species

__all__ = ['Prediction', 'UnreadableFile', 'cutout', 'load_model', 'predict']

LIKELIEST = 5  # breeds of a Prediction
FILES = str, os.PathLike, bytes, bytearray, memoryview  # paths and contents


class Prediction(NamedTuple):
    """What `predict` finds in an image of H x W pixels; None for a task that the model does not have."""

    breed: str | None  # the likeliest
    probability: float | None  # of that breed, in [0, 1]
    breeds: list | None  # the five likeliest, (breed, probability), the likeliest first
    species: str | None  # 'cat' or 'dog'; also None if the model file does not know the species of its breeds
    species_probability: float | None  # in [0, 1], see `utils.likeliest_species`
    bbox: tuple | None  # xmin, ymin, xmax, ymax of the head in pixels, float
    mask: np.ndarray | None  # (H, W) bool, True where the pet is
    mask_probability: np.ndarray | None  # (H, W) float32 in [0, 1]; the mask is where it is above 0.5


def predict(model, images, flip=False, batch_size=4, device=None):
    """The Prediction of a model from `load_model` for an image, or for each of many.

    Args:
        images: an image: a path, the bytes of a file or a binary file, a PIL image of any mode, a uint8 array
            (H, W, 3) RGB or (H, W) grey, or a uint8 tensor (3, H, W), of any size. Or a list or tuple of images, or
            an iterator of them.
        flip: average over the image and its mirror image, which takes twice the time. The head boxes get better (IoU
            higher by about 0.015), masks and breeds hardly.
        batch_size: images that go through the network together; more than 4 are faster only on a GPU.
        device: move the model there first, such as to 'cuda'; None leaves it where it is.

    Returns a Prediction for an image, a list of them in order for a list, and an iterator of them for an iterator,
    which is read one batch at a time. Files and PIL images are taken as viewers show them: turned as their EXIF says,
    in sRGB, what is transparent on white; arrays and tensors as they are. A JPEG above 100 megapixels is read at a
    half of its size or less, and masks and boxes are of that. `model` must be in evaluation mode, as `load_model`
    leaves it.

    Raises UnreadableFile for a file that is no image, ValueError for anything else that is none, and InputError if the
    model's outputs are not finite. An image that cannot be used raises before any of its batch is predicted.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size {batch_size}; expected 1 or more')
    if device is not None:
        model.to(device)
    network = FlipAveraged(model) if flip else model
    if isinstance(images, (*FILES, Image.Image, np.ndarray, torch.Tensor)) or hasattr(images, 'read'):
        return next(iterate(network, model, [images], 1))
    if not isinstance(images, Iterable) or isinstance(images, (dict, set)):
        refuse(images)
    predictions = iterate(network, model, images, batch_size)
    return list(predictions) if isinstance(images, (list, tuple)) else predictions


def iterate(network, model, images, batch_size):
    """Yield a Prediction for each of `images`; `network` is `model` or its FlipAveraged."""
    images = iter(images)
    height, width = model.image_size
    device = next(model.parameters()).device
    while True:
        resized, sizes = [], []  # of a batch; photographs at their own size would fill the memory
        for image in map(to_image, islice(images, batch_size)):
            resized.append(pil_to_tensor(on_white(image).resize((width, height), Image.Resampling.BILINEAR)))
            sizes.append(image.size)
        if not resized:
            return
        pixels = torch.stack(resized).to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
        with torch.inference_mode():
            outputs = network(normalise(pixels))
        for row, size in enumerate(sizes):
            label, mask, bbox = (None if output is None else output[row] for output in outputs)
            yield make_prediction(model, label, mask, bbox, size)


def to_image(image):
    """An image as `predict` takes it -> a PIL image, upright and in sRGB, RGB or RGBA."""
    if isinstance(image, FILES) or hasattr(image, 'read'):
        return read_photograph(image)
    if isinstance(image, Image.Image) and all(image.size):
        with reading('a PIL image'):
            return to_srgb(upright(image))
    if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 3 and image.dtype == torch.uint8:
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3:
            return Image.fromarray(np.ascontiguousarray(image)).convert('RGB')
    refuse(image)


def refuse(value):
    """Raise the ValueError for a value that is no image."""
    found = type(value).__name__
    if isinstance(value, (np.ndarray, torch.Tensor)):
        found += f' {tuple(value.shape)} of {value.dtype}'
    elif isinstance(value, Image.Image):
        found += f' of {value.width} x {value.height} pixels'
    raise ValueError(
        'expected a path, the bytes of a file, a binary file, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 '
        f'tensor (3, H, W), or a list or an iterator of these; found {found}'
    )


@torch.inference_mode()
def make_prediction(model, label, mask, bbox, size):
    """The Prediction from the Outputs for one image, without their N, and its size (width, height)."""
    if not all(output.isfinite().all() for output in (label, mask, bbox) if output is not None):
        raise InputError('the outputs of the model are not finite for this photograph; train it again')
    found = dict.fromkeys(Prediction._fields)
    if label is not None:
        probabilities = label.double().softmax(dim=0).tolist()
        found['breeds'] = sorted(zip(model.class_names, probabilities), key=lambda pair: -pair[1])[:LIKELIEST]
        found['breed'], found['probability'] = found['breeds'][0]
        if any(model.class_species):
            number, probability = likeliest_species(torch.tensor([probabilities]), model.class_species)
            found['species'], found['species_probability'] = SPECIES[number], probability.item()
    if bbox is not None:
        found['bbox'] = tuple((bbox.double().cpu() * torch.tensor([*size, *size])).tolist())
    if mask is not None:
        logits = F.interpolate(mask[None], size=size[::-1], mode='bilinear', align_corners=False)[0, 0]
        found['mask_probability'] = logits.sigmoid().float().cpu().numpy()
        found['mask'] = found['mask_probability'] > 0.5
    return Prediction(**found)


def cutout(image, prediction):
    """The pet on a transparent background: a PIL image, RGBA, of the size of `image`, which is as for `predict`.

    Opaque where the mask's probability is above 3/4, transparent where it is below 1/4, in between in proportion; what
    is transparent in `image` stays so. Raises ValueError if the prediction is of an image of another size or has no
    mask.
    """
    picture = to_image(image)
    found = np.shape(prediction.mask_probability)
    if found != picture.size[::-1]:
        raise ValueError(f'a mask of the shape {found} does not belong to an image of {picture.size[::-1]}')
    alpha = (prediction.mask_probability * 2 - 0.5).clip(0, 1) * 255
    alpha = Image.fromarray(alpha.round().astype(np.uint8))
    picture.putalpha(ImageChops.multiply(alpha, picture.getchannel('A')) if picture.mode == 'RGBA' else alpha)
    return picture
