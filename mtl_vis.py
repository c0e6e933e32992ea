"""Draw what a trained network sees, or write it to files.

    python mtl_vis.py                               # some test pets, targets beside predictions
    python mtl_vis.py cat.jpg photos/ 'more/*.png'  # photographs: files, folders, patterns
    python mtl_vis.py photos/ --json pets.jsonl --cutouts cutouts --save-masks masks

Writes a picture, mask.png, and prints a line for each photograph: breed, probability, head box in pixels and the share
of the picture that the pet covers. A photograph that cannot be read gets a line on standard error and stops no other;
the exit status is then 1. From Python, see prediction.py.
"""

import argparse
import glob
import json
import os
import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from dataloader_mtl import MTLDataset, denormalise
from prediction import cutout, load_model, predict
from support.cli import InputError, file_to_write, folder_to_write, one_line, run_script, whole_number
from support.device import keep_freed_memory
from support.files import UnreadableFile, read_image, replacing, write_file

PREDICTED, TARGET = '#ff3b30', '#34c759'  # red and green
PANEL = (256, 1600)  # pixels: the smallest and the largest longer side of a drawn photograph
DRAWN = 12  # photographs in the picture
SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff', '.avif')  # looked for in folders


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


def draw_test_pets(model, root, count, seed, out, flip):
    """Test pets with a mask, if there are any: photograph, target and prediction side by side."""
    dataset = MTLDataset('test', root=root)
    indices = np.array(dataset.with_labels(['mask']) or range(len(dataset)))
    chosen = np.random.default_rng(seed).permutation(indices)[:count]
    rows = []
    for index in sorted(chosen.tolist()):
        image, bbox, label, mask = dataset[index]
        pixels = denormalise(image)
        prediction = predict(model, pixels, flip)
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


def refuse_to_overwrite(targets, inputs):
    """Raise InputError if two of the paths to write are one, or one of them is a file to read."""
    seen = {os.path.realpath(path) for path in inputs}
    for target in targets:
        if os.path.realpath(target) in seen:
            raise InputError(
                f'{target}: would be written over an input or twice; give other files and folders to write to, '
                'or photographs of different names'
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


class Photograph(NamedTuple):
    path: Path
    name: str  # of the files to write: with the folders below the one that was searched, mostly without suffix


def find_photographs(arguments, picture):
    """The Photographs that files, folders (searched to any depth) and patterns stand for, in order.

    Folders and patterns leave out `picture`, that of the run before. Photographs that differ in their suffix alone keep
    it in their name. Raises InputError for a folder or pattern without any; a file need not exist.
    """
    found = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            folder, paths = path, path.rglob('*')
        elif not os.path.lexists(path) and glob.has_magic(argument):
            folder = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
            paths = map(Path, glob.glob(argument, recursive=True))
        else:
            found.append(Photograph(path, path.stem))
            continue
        files = sorted(each for each in paths if each.suffix.lower() in SUFFIXES and each.is_file())
        # macOS leaves files like ._cat.jpg on other systems' disks.
        files = [each for each in files if each.name[0] != '.' and os.path.realpath(each) != os.path.realpath(picture)]
        found += [Photograph(each, str(each.relative_to(folder).with_suffix(''))) for each in files]
        if not files:
            raise InputError(f'{argument}: finds no image; looked for files that end in {", ".join(SUFFIXES)}')
    count = Counter(photograph.name for photograph in found)
    return [photograph if count[photograph.name] == 1 else with_suffix(photograph) for photograph in found]


def with_suffix(photograph):
    return photograph._replace(name=photograph.name + photograph.path.suffix)


def look_at_photographs(model, photographs, args):
    """Predict photographs from disk and write what `args` asks for; one that cannot be read stops no other."""
    rows, seen = [], 0
    with ExitStack() as stack:
        lines = None
        if args.json == '-':
            lines = sys.stdout
        elif args.json:
            lines = stack.enter_context(open(stack.enter_context(replacing(args.json)), 'w', encoding='utf-8'))
        # A bar for what takes longer than two seconds.
        for path, name in tqdm(photographs, unit='photograph', delay=2, leave=False, disable=None):
            try:
                image = read_image(path, upright=True)
            except UnreadableFile as error:
                tqdm.write(one_line(f'error: {error}'), file=sys.stderr)
                continue
            prediction = predict(model, image, flip=args.flip)  # on a CPU, batches are no faster
            seen += 1
            if lines:
                print(json.dumps(as_json(path, image.size, prediction)), file=lines, flush=args.json == '-')
            if args.json != '-':
                tqdm.write(one_line(f'{path}: {describe(prediction)}'), file=sys.stdout)
            if args.save_masks:
                save_png(mask_path(args, name), Image.fromarray(prediction.mask.astype(np.uint8) * 255))
            if args.cutouts:
                save_png(cutout_path(args, name), cutout(image, prediction))
            if seen <= DRAWN:
                rows.append(photograph_row(image, prediction))
    if rows:
        save_picture(rows, args.out)
        what = f'the first {DRAWN} of {seen} photographs' if seen > DRAWN else f'{seen} photograph{"s"[: seen > 1]}'
        print(f'{args.out}: {what}', file=sys.stderr if args.json == '-' else sys.stdout)
    if seen < len(photographs):
        raise InputError(f'{len(photographs) - seen} of {len(photographs)} photographs cannot be read')


def save_png(path, image):
    """Write a PIL image; at this level in a third of the time, and about 15 % larger."""
    write_file(path, partial(image.save, format='PNG', compress_level=1))


def mask_path(args, name):
    return Path(args.save_masks) / f'{name}_mask.png'


def cutout_path(args, name):
    return Path(args.cutouts) / f'{name}_cutout.png'


def as_json(path, size, prediction):
    """What --json writes of a photograph of `size`, (width, height); null for what the model has no task for."""
    record = {'file': str(path), 'width': size[0], 'height': size[1]}
    for field in 'breed', 'probability', 'breeds', 'species', 'species_probability', 'bbox':
        record[field] = getattr(prediction, field)
    if prediction.breeds is not None:
        record['breeds'] = [{'breed': breed, 'probability': probability} for breed, probability in prediction.breeds]
    record['mask_coverage'] = None if prediction.mask is None else float(prediction.mask.mean())
    return record


def json_target(text):
    return text if text == '-' else file_to_write(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('photographs', nargs='*', help='files, folders and patterns to look at (default: some test pets)')
    add('--model', default='mtl_model.pt', metavar='FILE', help='of train_mtl.py (default: %(default)s)')
    add('--data', default='datasets/data_new', metavar='DIR', help='of the test pets (default: %(default)s)')
    add('--count', type=whole_number(1), default=6, help='how many test pets (default: %(default)s)')
    add('--seed', type=whole_number(0), default=0, help='which test pets (default: %(default)s)')
    add('--flip', action='store_true', help='average with the mirror image: a better head box, in twice the time')
    add('--json', type=json_target, metavar='FILE', help='write a line of JSON for each photograph; -: print it')
    add('--save-masks', type=folder_to_write, metavar='DIR', help="write each photograph's mask as DIR/NAME_mask.png")
    add(
        '--cutouts',
        type=folder_to_write,
        metavar='DIR',
        help='write each pet on transparent ground as DIR/NAME_cutout.png',
    )
    add('--out', type=file_to_write, default='mask.png', metavar='FILE', help='the picture (default: %(default)s)')
    args = parser.parse_args(argv)
    if not args.photographs and (args.json or args.save_masks or args.cutouts):
        parser.error('--json, --save-masks and --cutouts need photographs')
    photographs = find_photographs(args.photographs, args.out)
    targets = [args.out] + [args.json] * (args.json not in (None, '-'))
    targets += [mask_path(args, each.name) for each in photographs if args.save_masks]
    targets += [cutout_path(args, each.name) for each in photographs if args.cutouts]
    refuse_to_overwrite(targets, [args.model, *(each.path for each in photographs)])
    keep_freed_memory()
    model = load_model(args.model)
    if (args.save_masks or args.cutouts) and 'mask' not in model.tasks:
        raise InputError(f'{args.model}: a network without masks; --save-masks and --cutouts need one')
    if photographs:
        look_at_photographs(model, photographs, args)
    else:
        draw_test_pets(model, args.data, args.count, args.seed, args.out, args.flip)


if __name__ == '__main__':
    run_script(main)
