"""How good is a model where pets are small, several, or in poor light? Four changed copies of a split.

    python benchmarks/robustness.py --data datasets/data_new --model mtl_model.pt

The photographs of the pets show one, large and in the middle. Here each is at 0.3 to 0.8 of its size on the background
of another photograph (`zoom_out`), dark, blurred and noisy (`poor_light`), both, and four in one picture. These are
drawn pictures: they rank models, but photographs from elsewhere differ. `zoom_out` and `poor_light` are part of
training, too, on training images. Metrics are means over the images, with 95 % bootstrap intervals. There is no ratio.
"""

import common
import numpy as np
import torch
import torch.nn.functional as F

from dataloader_mtl import MTLDataset
from evaluation import bootstrap_interval, score
from models import MODEL, load_model
from support.cli import run_script
from support.device import has_fast_bfloat16, seed_everything
from utils import mean_value


def four_in_one(images, boxes, masks):
    """Each image with the three before it in the batch, all at half the size; boxes and masks go along."""
    images, masks = (F.interpolate(each.float(), scale_factor=0.5, mode='area') for each in (images, masks))
    images, masks = (
        torch.cat([torch.cat([each, each.roll(1, 0)], 3), torch.cat([each.roll(2, 0), each.roll(3, 0)], 3)], 2)
        for each in (images, masks.round())
    )
    return images / 255, boxes / 2, masks.byte()


COPIES = {
    'as it is': {},
    'small': {'zoom_out': 1},
    'poor light': {'poor_light': 1},
    'small, in poor light': {'zoom_out': 1, 'poor_light': 1},
    'four in one': {'transform': four_in_one},
}
COLUMNS = {'Dice': 'dice', 'breeds': 'accuracy', 'species': 'species', 'box IoU': 'box_iou'}


def robustness(model, data, split):
    """{copy: {column: ndarray of the values of its images}}."""
    device, found = torch.device('cpu'), {}
    for name, options in COPIES.items():
        seed_everything(0)
        values, _ = score(model, MTLDataset(split, root=data, **options), device, bfloat16=has_fast_bfloat16(device))
        columns = COLUMNS if name != 'four in one' else ['Dice']  # whose breed and box?
        found[name] = {column: values[COLUMNS[column]] for column in columns if COLUMNS[column] in values}
        found[name] = {column: each[~np.isnan(each)] for column, each in found[name].items()}
    return found


def main(argv=None):
    parser = common.make_parser(__doc__, pets=300)
    parser.add_argument('--model', default=MODEL, metavar='FILE', help='default: %(default)s')
    parser.add_argument('--split', choices=('val', 'test'), default='val', help='default: %(default)s')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    with common.prepared(args.data, 300) as data:
        rows = []
        for name, columns in robustness(load_model(args.model), data, args.split).items():
            cells = []
            for column in COLUMNS:
                values = columns.get(column, ())
                low, high = bootstrap_interval([values]) if len(values) else (0, 0)
                cells.append(f'{mean_value(values):.3f} ({low:.3f}-{high:.3f})' if len(values) else '')
            rows.append([name, *cells])
        common.print_table(['', *COLUMNS], rows)


if __name__ == '__main__':
    run_script(main)
