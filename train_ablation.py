"""Train the multi-task network without one of its auxiliary tasks.

    python train_ablation.py --without bbox      # AblatedNet: mask and class
    python train_ablation.py --without class     # AblatedNet2: mask and box

Prints a line per epoch and, at the end, the test metrics of the best epoch in validation.
Writes the run to runs/without_bbox/ or runs/without_class/.
"""

import engine
from models import AblatedNet, AblatedNet2
from support.cli import run_script
from utils import WeightedLoss

NETWORKS = {'bbox': AblatedNet, 'class': AblatedNet2}


def main(argv=None):
    parser = engine.training_parser(__doc__, out='runs/without_TASK')
    parser.add_argument('--without', choices=NETWORKS, required=True, help='the task to leave out')
    args = parser.parse_args(argv)
    if args.out == parser.get_default('out'):
        args.out = f'runs/without_{args.without}'
    network = NETWORKS[args.without]
    engine.train(network, WeightedLoss.equal(network.tasks), engine.Config.from_args(args))


if __name__ == '__main__':
    run_script(main)
