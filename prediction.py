"""What a trained model finds in photographs: the pet's mask, its breed and the box of its head.

from prediction import cutout, load_model, predict
model = load_model()
prediction = predict(model, 'cat.jpg')
print(prediction.breed, prediction.probability, prediction.bbox, prediction.mask.mean())
cutout('cat.jpg', prediction).save('cutout.png')
"""

import math
import os
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

from dataloader_mtl import normalise
from models import FlipAveraged, Outputs, load_model
from support.cli import InputError
from support.images import UnreadableFile, on_white, read_photograph, reading, to_srgb, upright
from support.splits import SPECIES
from utils import likeliest_species

__all__ = ['Prediction', 'UnreadableFile', 'cutout', 'load_model', 'predict']

LIKELIEST = 5  # breeds of a Prediction
SMALL = 0.75  # of a side of the photograph: a pet that reaches over less of both is looked at again
KEPT = 1024  # pixels, or up to twice as many, of the shorter side of a photograph that is kept for that
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


def predict(model, images, flip=False, batch_size=4, device=None, zoom=True):
    """The Prediction of a model from `load_model` for an image, or for each of many.

    Args:
        images: an image: a path, the bytes of a file or a binary file, a PIL image of any mode, a uint8 array
            (H, W, 3) RGB or (H, W) grey, or a uint8 tensor (3, H, W), of any size. Or a list or tuple of images, or
            an iterator of them.
        flip: average over the image and its mirror image, which takes twice the time. Head boxes and breeds get better
            (IoU and accuracy by 0.003 with the shipped `mtl_model.pt`), masks hardly.
        batch_size: images that go through the network together; more than 4 are faster only on a GPU.
        device: move the model there first, such as to 'cuda'; None leaves it where it is.
        zoom: look again at a small pet, one whose mask reaches over less than three quarters of both sides, in the part
            of the photograph around it. Masks and breeds are the mean of both looks, the box is that of the second.

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
        return next(iterate(network, model, [images], 1, zoom))
    if not isinstance(images, Iterable) or isinstance(images, (dict, set)):
        refuse(images)
    predictions = iterate(network, model, images, batch_size, zoom)
    return list(predictions) if isinstance(images, (list, tuple)) else predictions


class Look(NamedTuple):
    """What the network finds in a picture of H x W pixels; None for a task that it does not have."""

    breeds: torch.Tensor | None  # (n_classes,) float64 probabilities
    mask: np.ndarray | None  # (H, W) float32 probabilities
    bbox: np.ndarray | None  # (4,) float64 in pixels


def iterate(network, model, images, batch_size, zoom):
    """Yield a Prediction for each of `images`; `network` is `model` or its FlipAveraged."""
    images = iter(images)
    resize = partial(Image.Image.resize, size=model.image_size[::-1], resample=Image.Resampling.BILINEAR)
    while True:
        resized, sizes, kept = [], [], []  # of a batch; photographs at their own size would fill the memory
        for image in map(to_image, islice(images, batch_size)):
            picture = on_white(image)
            resized.append(resize(picture))
            sizes.append(picture.size)
            kept.append(picture.reduce(max(1, min(picture.size) // KEPT)) if zoom else None)
        if not resized:
            return
        outputs = run_network(network, model, resized)
        parts = [around_small_pet(each.mask, size) if zoom else None for each, size in zip(outputs, sizes)]
        resized = [
            resize(picture, box=tuple(np.array(part) * (picture.size * 2) / (size * 2)))
            for picture, size, part in zip(kept, sizes, parts)
            if part
        ]
        closer = iter(run_network(network, model, resized) if resized else [])
        for each, size, part in zip(outputs, sizes, parts):
            found = look(each, size)
            if part:
                left, top, right, bottom = part
                found = with_closer(found, look(next(closer), (right - left, bottom - top)), part)
            yield make_prediction(model, found)


@torch.inference_mode()
def run_network(network, model, pictures):
    """PIL images, RGB, of the model's size -> for each, Outputs without their N."""
    device = next(model.parameters()).device
    pixels = torch.stack([pil_to_tensor(picture) for picture in pictures])
    # This memory format is twice as fast on a CPU.
    outputs = network(normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last))
    return [Outputs(*(None if output is None else output[row] for output in outputs)) for row in range(len(pictures))]


def around_small_pet(mask, size):
    """The part of a picture of `size` around a small pet, twice as wide and high as it, at least 1 / 8 of the picture.

    Left, top, right and bottom, int. The pet is where the mask's logits (1, H, W) are above zero. None if there is no
    mask or no pet, if it is not small, or if the part is the whole picture.
    """
    if mask is None or not (mask > 0).any():
        return None
    corners = masks_to_boxes(mask.cpu() > 0).view(2, 2)  # its first and last pixel
    corners[1] += 1
    low, high = corners / torch.tensor(mask.shape[:0:-1])
    if (high - low).max() >= SMALL:
        return None
    margin = ((high - low) / 2).clamp(min=1 / 16)
    low, high = ((edge * torch.tensor(size)).tolist() for edge in ((low - margin).clamp(min=0), high + margin))
    part = *map(int, low), *(min(math.ceil(edge), side) for edge, side in zip(high, size))
    return None if part == (0, 0, *size) else part


def look(outputs, size):
    """The Look of an image's Outputs, without their N, for its size (width, height).

    Raises InputError for outputs that are not finite.
    """
    if not all(output.isfinite().all() for output in outputs if output is not None):
        raise InputError('the outputs of the model are not finite for this photograph; train it again')
    label, mask, bbox = outputs
    if mask is not None:
        logits = F.interpolate(mask[None], size=size[::-1], mode='bilinear', align_corners=False)[0, 0]
        mask = logits.sigmoid().float().cpu().numpy()
    return Look(
        breeds=None if label is None else label.double().softmax(dim=0).cpu(),
        mask=mask,
        bbox=None if bbox is None else bbox.double().cpu().numpy() * [*size, *size],
    )


def with_closer(found, closer, part):
    """The Look at a photograph and that at a part of it as one; the mask of the first is changed."""
    left, top, right, bottom = part
    mask = found.mask[top:bottom, left:right]
    mask += (closer.mask - mask) / 2
    return Look(
        breeds=None if found.breeds is None else (found.breeds + closer.breeds) / 2,
        mask=found.mask,
        bbox=None if found.bbox is None else closer.bbox + [left, top, left, top],
    )


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


def make_prediction(model, found):
    """The Prediction of a Look."""
    prediction = dict.fromkeys(Prediction._fields)
    if found.breeds is not None:
        pairs = zip(model.class_names, found.breeds.tolist())
        prediction['breeds'] = sorted(pairs, key=lambda pair: -pair[1])[:LIKELIEST]
        prediction['breed'], prediction['probability'] = prediction['breeds'][0]
        if any(model.class_species):
            number, probability = likeliest_species(found.breeds[None], model.class_species)
            prediction['species'], prediction['species_probability'] = SPECIES[number], probability.item()
    if found.bbox is not None:
        prediction['bbox'] = tuple(found.bbox.tolist())
    if found.mask is not None:
        prediction['mask_probability'], prediction['mask'] = found.mask, found.mask > 0.5
    return Prediction(**prediction)


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
