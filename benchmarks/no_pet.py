"""What does a model answer where there is no pet? Drawn backgrounds, and the same pictures with the pet.

    python benchmarks/no_pet.py
    python benchmarks/no_pet.py --count 1000 --model runs/mtl/best.pt

The networks are trained on pictures of one pet; nothing tells them that there may be none. Printed are, over
--count drawn pictures, the share of the picture that the mask covers and the probability of the likeliest breed:
quartiles, and the share of pictures with more than 5 % covered. The ratio: the mean coverage without a pet to
that with one.
"""

import common
import numpy as np

from prediction import load_model, predict
from support.cli import InputError, run_script, whole_number
from synthetic_pets import draw_background, draw_pet


def main(argv=None):
    parser = common.parser(__doc__)
    add = parser.add_argument
    add('--model', default=common.ROOT / 'mtl_model.pt', metavar='FILE', help='default: %(default)s')
    add('--count', type=whole_number(1), default=200, help='pictures of each kind (default: %(default)s)')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    model = load_model(args.model)
    if not {'mask', 'class'} <= set(model.tasks):
        raise InputError(f'{args.model}: a network without masks or breeds')
    kinds = {
        'without a pet': (draw_background(index) for index in range(args.count)),
        'with a pet': (draw_pet(index).image for index in range(args.count)),
    }
    rows, results = [], {}
    for kind, pictures in kinds.items():
        pairs = [(each.mask.mean(), each.probability) for each in predict(model, pictures)]
        coverage, probability = map(np.array, zip(*pairs))
        quartiles = [
            ' '.join(f'{each:.3f}' for each in np.quantile(values, (0.25, 0.5, 0.75)))
            for values in (coverage, probability)
        ]
        rows.append([kind, *quartiles, f'{(coverage > 0.05).mean():.2f}'])
        results[kind] = {'coverage': coverage.tolist(), 'probability': probability.tolist()}
    common.print_table(
        ['drawn pictures', 'mask coverage, quartiles', 'probability, quartiles', 'over 5 % covered'], rows
    )
    without, with_pet = (np.mean(results[kind]['coverage']) for kind in kinds)
    common.finish(float(without / with_pet), results, args.json)


if __name__ == '__main__':
    run_script(main)
