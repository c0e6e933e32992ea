"""Draw what a trained network sees, or write it to files.

    python mtl_vis.py                               # some test images, targets beside predictions
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
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from dataloader_mtl import MTLDataset
from models import MODEL
from prediction import cutout, load_model, predict
from support.cli import InputError, file_to_write, folder_to_write, one_line, run_script, whole_number
from support.device import keep_freed_memory
from support.files import write_file
from support.hdf5 import MASK_UNKNOWN
from support.images import find_images, on_white, read_photograph
from support.report import new_figure

PREDICTED, TARGET = '#ff3b30', '#34c759'  # red and green
PANEL = (256, 1600)  # pixels: the smallest and the largest longer side of a drawn photograph
PANEL_OF_SEVERAL = (256, 640)
DRAWN = 12  # photographs in the picture


# ---- the picture: rows of (title, panel); a panel is a (3, H, W) uint8 tensor


def draw_boxes(photograph, boxes):
    """The photograph with boxes, {colour: (xmin, ymin, xmax, ymax) in pixels or None}."""
    boxes = {colour: box for colour, box in boxes.items() if box is not None}
    if not boxes:
        return photograph
    width = max(2, max(photograph.shape[1:]) // 120)
    return draw_bounding_boxes(photograph, torch.tensor(list(boxes.values())), colors=list(boxes), width=width)


def plain_mask(mask):
    """A uint8 mask (H, W): 1 (pet) in white, 0 (background) in black, 255 (unknown) in grey."""
    return torch.where(mask == MASK_UNKNOWN, 128, mask * 255).expand(3, -1, -1)


def enlarged(panel):
    """A whole multiple of a small panel, so that its title fits beside the next one's."""
    scale = -(-PANEL[0] // max(panel.shape[1:]))
    return panel.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def caption(prediction):
    return f'{prediction.breed} ({prediction.probability:.0%})' if prediction.breed else 'Photograph'


def sample_row(model, dataset, index, flip):
    """Photograph, target mask and predicted mask of one sample of an MTLDataset."""
    images, boxes, masks = dataset.read([index])
    photograph, bbox, label = images[0], boxes[0], dataset.split.labels[index]
    if photograph.is_floating_point():
        photograph = (photograph * 255).round().clamp(0, 255).to(torch.uint8)
    prediction = predict(model, photograph, flip)
    target = None if bbox.isnan().any() else bbox.tolist()
    truth = f'\ntrue: {dataset.split.class_names[label]}' if label >= 0 and prediction.breed else ''
    boxed = draw_boxes(photograph, {TARGET: target, PREDICTED: prediction.bbox})
    row = [(caption(prediction) + truth, boxed), ('Target Mask', plain_mask(masks[0, 0]))]
    if prediction.mask is not None:
        row.append(('Predicted Mask', plain_mask(torch.from_numpy(prediction.mask).to(torch.uint8))))
    return [(title, enlarged(panel)) for title, panel in row]


def photograph_row(photograph, prediction, title, panel):
    """A photograph and its predicted mask, at its own size unless that is outside `panel`."""
    longer = max(photograph.size)
    scale = min(max(longer, panel[0]), panel[1]) / longer
    size = tuple(max(1, round(side * scale)) for side in photograph.size)
    pixels = pil_to_tensor(photograph.resize(size))
    bbox = prediction.bbox and tuple(coordinate * scale for coordinate in prediction.bbox)
    row = [(title, draw_boxes(pixels, {PREDICTED: bbox}))]
    if prediction.mask is not None:
        mask = torch.from_numpy(np.array(Image.fromarray(prediction.mask).resize(size)))
        row.append(('Predicted Mask', draw_segmentation_masks(pixels, mask, alpha=0.6, colors=PREDICTED)))
    return row


def save_picture(rows, path):
    """Write the rows as one PNG, every panel at its own size and aspect ratio."""
    margin, dpi = 44, 100  # pixels around a panel, for a title of two lines
    sizes = [[panel.shape[1:] for _, panel in row] for row in rows]
    heights = [max(height for height, _ in row) + margin for row in sizes]
    columns = [max(row[i][1] for row in sizes if i < len(row)) + margin for i in range(len(rows[0]))]
    whole = np.array([sum(columns), sum(heights)])
    figure = new_figure(figsize=whole / dpi, dpi=dpi)
    for y, row in enumerate(rows):
        for x, (title, panel) in enumerate(row):
            height, width = panel.shape[1:]
            left = sum(columns[:x]) + (columns[x] - width) / 2
            bottom = sum(heights[y + 1 :]) + (heights[y] - margin - height) / 2
            axes = figure.add_axes((*(left, bottom) / whole, *(width, height) / whole))
            axes.imshow(panel.permute(1, 2, 0).numpy(), interpolation='nearest')
            axes.set_title(title, fontsize=10, parse_math=False)  # a name may have a $
            axes.axis('off')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the font has no sign for each of a name's characters
        write_file(path, lambda file: figure.savefig(file, format='png', dpi=dpi))


# ---- test images


def draw_test_images(model, args):
    """Draw test images, of those with a mask if there are any."""
    dataset = MTLDataset('test', root=args.data)
    indices = dataset.with_labels(['mask']) or range(len(dataset))
    chosen = sorted(np.random.default_rng(args.seed).permutation(indices)[: args.count].tolist())
    save_picture([sample_row(model, dataset, index, args.flip) for index in chosen], args.out)
    print(f'{args.out}: {len(chosen)} test images; boxes: target green, prediction red')


# ---- photographs


class Photograph(NamedTuple):
    path: Path
    name: str  # of its outputs: its path below the folder that was searched, mostly without suffix

    def output(self, folder, kind):
        """The file to write; `kind` is 'mask' or 'cutout'."""
        return Path(folder) / f'{self.name}_{kind}.png'


def find_photographs(arguments, written):
    """The Photographs that files, folders (searched to any depth) and patterns stand for, in order.

    Folders and patterns leave out what is hidden and `written`, the outputs of an earlier run. Photographs whose names
    differ only in the suffix keep it. Raises InputError for a folder or pattern without any; a file need not exist.
    """
    found, left_out = [], {Path(path).resolve() for path in written if path}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            folder, pattern = path, None
        elif not os.path.lexists(path) and glob.has_magic(argument):
            folder, pattern = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts)), argument
        else:
            found.append(Photograph(path, path.stem))
            continue
        outside = {folder.resolve(), *folder.resolve().parents}
        for file in find_images(folder, pattern):
            if not left_out & {file.resolve(), *file.resolve().parents} - outside:
                found.append(Photograph(file, str(file.relative_to(folder).with_suffix(''))))
    count = Counter(photograph.name for photograph in found)
    return [
        Photograph(path, name if count[name] == 1 else name + path.suffix)  # cat.jpg and cat.png
        for path, name in found
    ]


def refuse_to_overwrite(photographs, args):
    """Raise InputError if two of the files that `args` asks for are one, or one of them is an input."""
    targets = [(args.out, None)]  # (file to write, the photograph that it is of)
    if args.json and args.json != '-':
        targets.append((args.json, None))
    for folder, kind in (args.save_masks, 'mask'), (args.cutouts, 'cutout'):
        if folder:
            targets += [(photograph.output(folder, kind), photograph.path) for photograph in photographs]
    taken = {os.path.realpath(path): 'an input' for path in (args.model, *(each.path for each in photographs))}
    for target, source in targets:
        real = os.path.realpath(target)
        if real in taken:
            raise InputError(
                f'{target}: would be written over {taken[real]}; give other files and folders to write to, or '
                'photographs of different names'
            )
        taken[real] = f'that of {source}' if source else 'another output'


def look_at_photographs(model, photographs, args):
    """Predict photographs from disk and write what `args` asks for; one that cannot be read stops no other."""
    rows, records, panel = [], [], PANEL if len(photographs) == 1 else PANEL_OF_SEVERAL
    folders = {'mask': args.save_masks, 'cutout': args.cutouts}
    try:
        # A bar if it takes longer than two seconds.
        for photograph in tqdm(photographs, unit='photograph', delay=2, leave=False, disable=None):
            try:
                image = read_photograph(photograph.path)
                prediction = predict(model, image, flip=args.flip)  # on a CPU, batches are no faster
            except Exception as error:  # whatever it is, it is of this photograph
                name = '' if str(photograph.path) in str(error) else f'{photograph.path}: '
                tqdm.write(one_line(f'error: {name}{str(error) or type(error).__name__}'), file=sys.stderr)
                continue
            record = as_json(photograph.path, image.size, prediction)
            files = {f'{kind}_file': photograph.output(folder, kind) for kind, folder in folders.items() if folder}
            records.append(json.dumps(record | {key: str(path) for key, path in files.items()}))
            line = records[-1] if args.json == '-' else one_line(f'{photograph.path}: {describe(prediction)}')
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            if args.save_masks:
                save_png(Image.fromarray(prediction.mask).convert('L'), files['mask_file'])
            if args.cutouts:
                save_png(cutout(image, prediction), files['cutout_file'])
            if len(records) <= DRAWN:
                name = '' if len(photographs) == 1 else f'{photograph.path.name[-40:]}\n'
                rows.append(photograph_row(on_white(image), prediction, name + caption(prediction), panel))
    finally:  # what was found is kept, whatever ends the run
        if args.json and args.json != '-':
            write_file(args.json, lambda file: file.writelines(f'{record}\n'.encode() for record in records))
    seen = len(records)
    if rows:
        save_picture(rows, args.out)
        drawn = f'the first {DRAWN} of {seen}' if seen > DRAWN else seen
        noun = 'photograph' if seen == 1 else 'photographs'
        print(f'{args.out}: {drawn} {noun}', file=sys.stderr if args.json == '-' else sys.stdout)
    if seen < len(photographs):
        raise InputError(f'{len(photographs) - seen} of {len(photographs)} photographs failed')


def describe(prediction):
    """'Bengal 87.3%, box 12 40 96 130, mask 34.5% of the picture'."""
    parts = []
    if prediction.breed is not None:
        parts.append(f'{prediction.breed} {prediction.probability:.1%}')
    if prediction.bbox is not None:
        parts.append('box ' + ' '.join(f'{coordinate:.0f}' for coordinate in prediction.bbox))
    if prediction.mask is not None:
        parts.append(f'mask {prediction.mask.mean():.1%} of the picture')
    return ', '.join(parts)


def as_json(path, size, prediction):
    """What --json writes of a photograph of `size`, (width, height); None for tasks that the model does not have."""
    record = {'file': str(path), 'width': size[0], 'height': size[1]}
    for field in 'breed', 'probability', 'breeds', 'species', 'species_probability', 'bbox':
        record[field] = getattr(prediction, field)
    if prediction.breeds is not None:
        record['breeds'] = [{'breed': breed, 'probability': probability} for breed, probability in prediction.breeds]
    record['mask_coverage'] = None if prediction.mask is None else float(prediction.mask.mean())
    return record


def save_png(image, path):
    """Write a PIL image. Level 1 takes a third of the time, for files about 15 % larger."""
    write_file(path, partial(image.save, format='PNG', compress_level=1))


def json_target(text):
    """An argparse type: a file that can be written, or '-'."""
    return text if text == '-' else file_to_write(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('photographs', nargs='*', help='files, folders and patterns to look at (default: some test images)')
    add('--model', default=MODEL, metavar='FILE', help='a model file (default: mtl_model.pt beside this script)')
    add(
        '--data',
        default='datasets/data_new',
        metavar='DIR',
        help='folder of the splits with the test images (default: %(default)s)',
    )
    add('--count', type=whole_number(1), default=6, help='how many test images (default: %(default)s)')
    add('--seed', type=whole_number(0), default=0, help='which test images (default: %(default)s)')
    add('--flip', action='store_true', help='average with the mirror image: better box and breed, in twice the time')
    add('--json', type=json_target, metavar='FILE', help='write a line of JSON for each photograph; -: print it')
    add('--save-masks', type=folder_to_write, metavar='DIR', help="write each photograph's mask as DIR/NAME_mask.png")
    add('--cutouts', type=folder_to_write, metavar='DIR', help='write each pet cut out as DIR/NAME_cutout.png')
    add('--out', type=file_to_write, default='mask.png', metavar='FILE', help='the picture (default: %(default)s)')
    args = parser.parse_args(argv)
    if not args.photographs and (args.json or args.save_masks or args.cutouts):
        parser.error('--json, --save-masks and --cutouts need photographs')
    photographs = find_photographs(args.photographs, (args.out, args.save_masks, args.cutouts))
    refuse_to_overwrite(photographs, args)
    keep_freed_memory()
    model = load_model(args.model)
    if (args.save_masks or args.cutouts) and 'mask' not in model.tasks:
        raise InputError(f'{args.model}: a network without masks; --save-masks and --cutouts need one')
    if photographs:
        look_at_photographs(model, photographs, args)
    else:
        draw_test_images(model, args)


if __name__ == '__main__':
    run_script(main)
