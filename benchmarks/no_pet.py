"""What does a model answer where there is no pet? Drawn backgrounds, and the same pictures with the pet.

    python benchmarks/no_pet.py
    python benchmarks/no_pet.py --count 1000 --model runs/mtl/best.pt

The networks are trained on pictures of one pet; nothing tells them that there may be none. Printed are, over --count
drawn pictures, quartiles of the share of the picture that the mask covers and of the probability of the likeliest
breed, and the share of pictures with more than 5 % covered. The ratio: the mean coverage without a pet to that with
one.
"""

import common
import numpy as np

from models import MODEL
from prediction import load_model, predict
from support.cli import run_script, whole_number
from support.synthetic_pets import draw_background, draw_pet


def quartiles(values):
    return ' '.join(f'{each:.3f}' for each in np.quantile(values, (0.25, 0.5, 0.75)))


def main(argv=None):
    parser = common.make_parser(__doc__)
    parser.add_argument('--model', default=MODEL, metavar='FILE', help='of MTLNet (default: the shipped one)')
    count_help = 'pictures of each kind (default: %(default)s)'
    parser.add_argument('--count', type=whole_number(1), default=200, help=count_help)
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    model = load_model(args.model)
    kinds = {
        'without a pet': (draw_background(index) for index in range(args.count)),
        'with a pet': (draw_pet(index).image for index in range(args.count)),
    }
    rows, means = [], []
    for kind, pictures in kinds.items():
        found = np.array([(each.mask.mean(), each.probability) for each in predict(model, pictures)])
        coverage, probability = found.T
        means.append(coverage.mean())
        rows.append([kind, quartiles(coverage), quartiles(probability), f'{(coverage > 0.05).mean():.2f}'])
    common.print_table(['drawn pictures', 'mask coverage', 'probability', 'over 5 % covered'], rows)
    print(f'ratio {means[0] / means[1]:.3g}')


if __name__ == '__main__':
    run_script(main)
