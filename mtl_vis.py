"""Draw what the trained multi-task network sees.

    python mtl_vis.py                            # some test pets, targets beside predictions
    python mtl_vis.py cat.jpg dog.png            # your own photographs, of any size
    python mtl_vis.py --save-masks masks/ *.jpg  # also each mask as a PNG of the photograph's size

Writes the picture to mask.png and prints a line for each photograph: breed, probability, head box in
pixels and the share of the picture that the pet covers. From Python:

    from PIL import Image
    from mtl_vis import load_model, predict
    prediction = predict(load_model('mtl_model.pt'), Image.open('cat.jpg'))
    print(prediction.breed, prediction.probability, prediction.bbox, prediction.mask.mean())
"""

import argparse
import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dataloader_mtl import MTLDataset, denormalise, normalise
from models import load_model
from support.cli import InputError, run_script, whole_number
from support.files import UnreadableFile, read_image, to_rgb, write_file

PREDICTED, TARGET = '#ff3b30', '#34c759'  # red and green
PANEL = (256, 1600)  # pixels: the smallest and the largest longer side of a drawn photograph


class Prediction(NamedTuple):
    """What `predict` finds; a task that the model does not have is None."""

    breed: str | None
    probability: float | None  # of that breed, in [0, 1]
    bbox: tuple | None  # xmin, ymin, xmax, ymax of the head in pixels of the photograph, float
    mask: np.ndarray | None  # (height, width) bool, True where the pet is


@torch.inference_mode()
def predict(model, image):
    """The Prediction of a model from `load_model` for a PIL image of any size and mode.

    The image is taken as its pixels are stored: for a photograph that EXIF says is rotated, pass
    `PIL.ImageOps.exif_transpose(image)`.
    """
    rgb = to_rgb(image)
    height, width = model.image_size
    small = rgb.resize((width, height), Image.Resampling.BILINEAR)
    device = next(model.parameters()).device
    outputs = model(normalise(v2.functional.pil_to_tensor(small).to(device))[None])
    if not all(output.isfinite().all() for output in outputs if output is not None):
        raise InputError('the model gives no finite numbers for this photograph; train it again')
    breed = probability = bbox = mask = None
    if outputs.label is not None:
        best = outputs.label[0].softmax(dim=0).max(dim=0)
        breed, probability = model.class_names[best.indices], best.values.item()
    if outputs.bbox is not None:
        bbox = tuple((outputs.bbox[0].cpu() * torch.tensor([*rgb.size, *rgb.size])).tolist())
    if outputs.mask is not None:
        logits = F.interpolate(outputs.mask, size=rgb.size[::-1], mode='bilinear', align_corners=False)
        mask = (logits[0, 0] > 0).cpu().numpy()
    return Prediction(breed, probability, bbox, mask)


# ---- panels: (3, H, W) uint8 tensors


def draw_boxes(photograph, boxes):
    """The photograph with boxes, {colour: (xmin, ymin, xmax, ymax) in pixels or None}."""
    boxes = {colour: box for colour, box in boxes.items() if box is not None}
    if not boxes:
        return photograph
    return draw_bounding_boxes(
        photograph,
        torch.tensor(list(boxes.values())),
        colors=list(boxes),
        width=max(2, max(photograph.shape[1:]) // 120),
    )


def draw_mask(photograph, mask, colour):
    """The photograph with the pet, a bool mask (H, W), tinted."""
    return draw_segmentation_masks(photograph, torch.as_tensor(mask), alpha=0.6, colors=colour)


def plain_mask(mask):
    """A float mask (H, W), 1 pet, 0 background, NaN unknown, in white, black and grey."""
    return (mask.nan_to_num(0.5) * 255).to(torch.uint8).expand(3, -1, -1)


def enlarged(panel):
    """A whole multiple of a small panel, so that its title fits beside the next one's."""
    scale = -(-PANEL[0] // max(panel.shape[1:]))
    return panel.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def caption(prediction):
    return f'{prediction.breed} ({prediction.probability:.0%})' if prediction.breed else 'Photograph'


def save_picture(rows, path):
    """Write rows of (title, panel) pairs as one PNG, every panel at its own size and aspect ratio."""
    from matplotlib.figure import Figure

    margin, dpi = 44, 100  # pixels around a panel, for a title of two lines
    sizes = [[panel.shape[1:] for _, panel in row] for row in rows]
    heights = [max(height for height, _ in row) + margin for row in sizes]
    columns = [max(row[i][1] for row in sizes if i < len(row)) + margin for i in range(len(rows[0]))]
    figure = Figure((sum(columns) / dpi, sum(heights) / dpi), dpi)
    for y, row in enumerate(rows):
        for x, (title, panel) in enumerate(row):
            height, width = panel.shape[1:]
            left = sum(columns[:x]) + (columns[x] - width) / 2
            bottom = sum(heights[y + 1 :]) + (heights[y] - margin - height) / 2
            axes = figure.add_axes(
                (left / sum(columns), bottom / sum(heights), width / sum(columns), height / sum(heights))
            )
            axes.imshow(panel.permute(1, 2, 0).numpy(), interpolation='nearest')
            axes.set_title(title, fontsize=10, parse_math=False)  # a name may have a $
            axes.axis('off')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the font has no sign for each of a name's characters
        write_file(path, lambda file: figure.savefig(file, format='png', dpi=dpi))


# ---- the two uses


def draw_test_pets(model, root, count, seed, out):
    """Test pets with a mask, if there are any: photograph, target and prediction side by side."""
    dataset = MTLDataset('test', root=root)
    indices = np.array(dataset.with_labels(['mask']) or range(len(dataset)))
    chosen = np.random.default_rng(seed).permutation(indices)[:count]
    rows = []
    for index in sorted(chosen.tolist()):
        image, bbox, label, mask = dataset[index]
        pixels = denormalise(image)
        prediction = predict(model, v2.functional.to_pil_image(pixels))
        height, width = pixels.shape[1:]
        target = None if bbox.isnan().any() else (bbox * torch.tensor([width, height] * 2)).tolist()
        truth = f'\nis {dataset.class_names[label]}' if label >= 0 and prediction.breed else ''
        boxed = draw_boxes(pixels, {TARGET: target, PREDICTED: prediction.bbox})
        row = [(caption(prediction) + truth, boxed), ('Target Mask', plain_mask(mask[0]))]
        if prediction.mask is not None:
            row.append(('Predicted Mask', plain_mask(torch.as_tensor(prediction.mask).float())))
        row = [(title, enlarged(panel)) for title, panel in row]
        rows.append(row)
    save_picture(rows, out)
    print(f'{out}: {len(rows)} test pets; boxes: target green, prediction red')


def draw_photographs(model, paths, masks_folder, out):
    """Photographs from disk: prediction only, a printed line each; a broken one stops no other."""
    rows, broken = [], []
    for path in paths:
        try:
            photograph = read_image(path, upright=True)  # as every viewer shows it
        except UnreadableFile as error:
            broken.append(str(error))
            continue
        prediction = predict(model, photograph)
        print(f'{path}: {describe(prediction)}')
        if masks_folder and prediction.mask is not None:
            picture = Image.fromarray(prediction.mask.astype(np.uint8) * 255)
            write_file(mask_path(masks_folder, path), partial(picture.save, format='PNG'))
        rows.append(photograph_row(photograph, prediction))
    if rows:
        save_picture(rows, out)
        print(f'written to {out}')
    if broken:
        raise InputError(f'{len(broken)} of {len(paths)} photographs cannot be read: {"; ".join(broken)}')


def mask_path(folder, photograph):
    return Path(folder) / f'{Path(photograph).stem}_mask.png'


def refuse_to_overwrite(targets, inputs):
    """Raise InputError if two of the paths to write are one, or one of them is a file to read."""
    seen = {os.path.realpath(path) for path in inputs}
    for target in targets:
        if os.path.realpath(target) in seen:
            raise InputError(
                f'{target}: would be written over an input or twice; give another --out or '
                '--save-masks, or one photograph at a time'
            )
        seen.add(os.path.realpath(target))


def photograph_row(photograph, prediction):
    """Panels for one photograph, at its own size unless that is outside PANEL."""
    longer = max(photograph.size)
    scale = min(max(longer, PANEL[0]), PANEL[1]) / longer
    size = tuple(max(1, round(side * scale)) for side in photograph.size)
    pixels = v2.functional.pil_to_tensor(photograph.resize(size))
    bbox = prediction.bbox and tuple(coordinate * scale for coordinate in prediction.bbox)
    row = [(caption(prediction), draw_boxes(pixels, {PREDICTED: bbox}))]
    if prediction.mask is not None:
        mask = np.array(Image.fromarray(prediction.mask).resize(size))
        row.append(('Predicted Mask', draw_mask(pixels, mask, PREDICTED)))
    return row


def describe(prediction):
    """'Bengal 87.3 %, head 12 40 96 130, mask 34.5 % of the picture'."""
    parts = []
    if prediction.breed is not None:
        parts.append(f'{prediction.breed} {prediction.probability:.1%}')
    if prediction.bbox is not None:
        parts.append('head ' + ' '.join(f'{coordinate:.0f}' for coordinate in prediction.bbox))
    if prediction.mask is not None:
        parts.append(f'mask {prediction.mask.mean():.1%} of the picture')
    return ', '.join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('photographs', nargs='*', help='files to look at (default: some test pets)')
    add('--model', default='mtl_model.pt', metavar='FILE', help='of train_mtl.py (default: %(default)s)')
    add('--data', default='datasets/data_new', metavar='DIR', help='of the test pets (default: %(default)s)')
    add('--count', type=whole_number(1), default=6, help='how many test pets (default: %(default)s)')
    add('--seed', type=whole_number(0), default=0, help='which test pets (default: %(default)s)')
    add('--save-masks', metavar='DIR', help="write each photograph's mask as DIR/NAME_mask.png")
    add('--out', default='mask.png', metavar='FILE', help='default: %(default)s')
    args = parser.parse_args(argv)
    if args.save_masks and not args.photographs:
        parser.error('--save-masks needs photographs')
    masks = [mask_path(args.save_masks, path) for path in args.photographs if args.save_masks]
    refuse_to_overwrite([args.out, *masks], [args.model, *args.photographs])
    model = load_model(args.model)
    if args.photographs:
        draw_photographs(model, args.photographs, args.save_masks, args.out)
    else:
        draw_test_pets(model, args.data, args.count, args.seed, args.out)


if __name__ == '__main__':
    run_script(main)
