"""The study's open-ended question (OEQ): how should the tasks' losses be weighted?

    python oeq_weighting.py                      # all seven, one after the other
    python oeq_weighting.py --only 80-10-10      # one of them

Trains the full network once for each weighting, segmentation-class-box in per cent, equal or learned
(uncertainty), into runs/weighting/NAME/, and prints the table sorted by validation Dice. With --resume,
finished weightings are only tested again and an unfinished one is resumed.
"""

from dataclasses import replace
from pathlib import Path

import engine
from models import MTLNet
from support.cli import run_script
from support.distributed import is_main_process, print_once, process_group
from utils import METRICS, UncertaintyLoss, WeightedLoss

FIXED = ('80-10-10', '70-15-15', '50-25-25', '25-50-25', '25-25-50')
NAMES = ('equal', *FIXED, 'uncertainty')


def weighting(name):
    """The weighting of a name; its tasks are in the order of MTLNet.tasks."""
    if name == 'equal':
        return WeightedLoss.equal(MTLNet.tasks)
    if name == 'uncertainty':
        return UncertaintyLoss(MTLNet.tasks)
    return WeightedLoss({task: int(share) / 100 for task, share in zip(MTLNet.tasks, name.split('-'))})


def print_table(rows):
    """`rows`: {name: metrics}. Ranked by validation Dice: choosing by test Dice would bias the winner's score."""
    print(f'{"weighting":14}{"val dice":>10}' + ''.join(f'{"test " + name:>15}' for name in METRICS))
    for name, metrics in sorted(rows.items(), key=lambda row: -row[1]['validation'].get('dice', 0)):
        test = ''.join(f'{metrics["test"].get(key, {}).get("mean", float("nan")):15.4f}' for key in METRICS)
        print(f'{name:14}{metrics["validation"].get("dice", float("nan")):10.4f}{test}')


def main(argv=None):
    parser = engine.training_parser(__doc__, out='runs/weighting')
    parser.add_argument('--only', choices=NAMES, metavar='NAME', help=f'one of {", ".join(NAMES)}')
    args = parser.parse_args(argv)
    root, rows = Path(args.out), {}
    names = (args.only,) if args.only else NAMES
    config = engine.Config.from_args(args)
    if args.resume:
        config = replace(config, resume='auto')  # some may be finished, others not begun
    with process_group(config.device):
        for name in names:
            print_once(f'---- {name}')
            rows[name] = engine.train(MTLNet, weighting(name), replace(config, out=str(root / name)))
        if is_main_process():
            print_table(rows)


if __name__ == '__main__':
    run_script(main)
