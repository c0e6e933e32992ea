"""Train the single-task baseline: the same U-Net, only for the mask.

    python train_baseline.py

Prints a line per epoch and, at the end, the test metrics of the best epoch in validation.
Writes the run to runs/baseline/. Images without a mask are not used.
"""

import engine
from models import UNet
from support.cli import run_script
from utils import WeightedLoss


def main(argv=None):
    args = engine.training_parser(__doc__, out='runs/baseline').parse_args(argv)
    engine.train(UNet, WeightedLoss.equal(UNet.tasks), engine.Config.from_args(args))


if __name__ == '__main__':
    run_script(main)
