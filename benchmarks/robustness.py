"""How good is a model where pets are small, several, or in poor light? Changed copies of a split.

    python benchmarks/robustness.py --data datasets/data_512 --model mtl_model.pt

The photographs of the pets show one, large and in the middle. Here each is at 0.3 to 0.8 of its size on the background
of another photograph (`zoom_out`), dark, blurred and noisy (`poor_light`), both, and four in one picture. These are
drawn pictures: they rank models, but photographs from elsewhere differ. `zoom_out` and `poor_light` are part of
training, too, on training images.

The pictures go through `predict`, with one look each and with a second one at small pets (`zoom`). That one sees more
only if the pictures are larger than the model's: `data_prepare.py --size 512`. Metrics are means over the images, with
95 % bootstrap intervals. The ratio: the Dice of small pets with the second look to that without.
"""

import common
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from dataloader_mtl import MEAN, STD, MTLDataset
from evaluation import bootstrap_interval
from models import MODEL
from prediction import load_model, predict
from support.cli import run_script
from support.device import seed_everything
from utils import dice_score, iou_metric

BATCH = 32  # in which pets are moved to each other's backgrounds


def four_in_one(images, boxes, masks):
    """Each image with the three before it in the batch, all at half the size; boxes and masks go along."""
    images = v2.functional.to_dtype(images, scale=True)
    images, masks = (F.interpolate(each, scale_factor=0.5, mode='area') for each in (images, masks.float()))
    images, masks = (
        torch.cat([torch.cat([each, each.roll(1, 0)], 3), torch.cat([each.roll(2, 0), each.roll(3, 0)], 3)], 2)
        for each in (images, masks.round())
    )
    return images, boxes / 2, masks.byte()


COPIES = {
    'as it is': {},
    'small': {'zoom_out': 1},
    'poor light': {'poor_light': 1},
    'small, in poor light': {'zoom_out': 1, 'poor_light': 1},
    'four in one': {'transform': four_in_one},
}
COLUMNS = ('Dice', 'breeds', 'species', 'box IoU')


def robustness(model, data, split):
    """{(copy, zoom): {column: list of the values of its images}}."""
    found, (mean, std) = {}, (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    for name, options in COPIES.items():
        seed_everything(0)
        dataset = MTLDataset(split, root=data, **options)
        looks = {zoom: {column: [] for column in COLUMNS} for zoom in (False, True)}
        for positions in torch.arange(len(dataset)).split(BATCH):
            batch = dataset[positions.tolist()]
            pictures = list(((batch.image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))
            for zoom, values in looks.items():
                add_values(values, predict(model, pictures, zoom=zoom), batch, dataset.split)
        columns = COLUMNS if name != 'four in one' else ['Dice']  # whose breed and box?
        for zoom, values in looks.items():
            found[name, zoom] = {column: values[column] for column in columns if values[column]}
    return found


def add_values(values, found, batch, split):
    """Add to `values`, {column: list}, those of the Predictions `found` for the images whose truth is known."""
    if found[0].mask is not None:
        probabilities = torch.stack([torch.from_numpy(each.mask_probability) for each in found])[:, None]
        values['Dice'] += dice_score(probabilities - 0.5, batch.mask, 'none').tolist()
    if found[0].bbox is not None:
        boxes = torch.tensor([each.bbox for each in found]) / torch.tensor(batch.mask.shape[:1:-1] * 2)
        values['box IoU'] += iou_metric(boxes, batch.bbox, 'none').tolist()
    for each, label in zip(found, batch.label.tolist()):
        if each.breed and label >= 0:
            values['breeds'].append(each.breed == split.class_names[label])
        if each.species and label >= 0 and split.class_species[label]:
            values['species'].append(each.species == split.class_species[label])


def main(argv=None):
    parser = common.make_parser(__doc__, pets=300, size=512)
    parser.add_argument('--model', default=MODEL, metavar='FILE', help='default: %(default)s')
    parser.add_argument('--split', choices=('val', 'test'), default='val', help='default: %(default)s')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    model = load_model(args.model)
    with common.prepared(args.data, 300, size=512) as data:
        found, rows = robustness(model, data, args.split), []
        for (name, zoom), columns in found.items():
            cells = []
            for column in COLUMNS:
                low, high = bootstrap_interval([np.array(columns[column])]) if column in columns else (0, 0)
                cells.append(f'{np.mean(columns[column]):.3f} ({low:.3f}-{high:.3f})' if column in columns else '')
            rows.append([f'{name}, zoom' if zoom else name, *cells])
    common.print_table(['', *COLUMNS], rows)
    if 'mask' in model.tasks:
        once, twice = (np.mean(found['small', zoom]['Dice']) for zoom in (False, True))
        print(f'ratio {twice / once:.3g}')


if __name__ == '__main__':
    run_script(main)
