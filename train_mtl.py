"""Train the multi-task network: mask, class and head box from one shared encoder.

    python train_mtl.py
    torchrun --nproc-per-node 2 train_mtl.py     # data-parallel, in two processes

Prints a line per epoch and, at the end, the test metrics of the best epoch in validation.
Writes the run to runs/mtl/ and the model that mtl_vis.py needs to the file mtl_model.pt beside this script.
"""

from pathlib import Path

import engine
from models import MODEL, MTLNet
from support.cli import file_to_write, run_script
from support.distributed import is_main_process, process_group
from support.files import write_file
from utils import WeightedLoss

# With equal weights, masks are worse than those of a mask-only network. These win most of that back (docs/study.md).
WEIGHTS = {'mask': 0.7, 'class': 0.15, 'box': 0.15}


def main(argv=None):
    parser = engine.training_parser(__doc__, out='runs/mtl')
    model_help = 'where the trained model goes (default: mtl_model.pt beside the scripts)'
    parser.add_argument('--model', type=file_to_write, default=MODEL, metavar='FILE', help=model_help)
    args = parser.parse_args(argv)
    with process_group(args.device):  # joined here, so that only rank 0 writes the model below
        engine.train(MTLNet, WeightedLoss(WEIGHTS), engine.Config.from_args(args))
        if is_main_process():
            best = (Path(args.out) / 'best.pt').read_bytes()
            write_file(args.model, lambda file: file.write(best))
            print(f'model written to {args.model}; next: python mtl_vis.py --data {args.data} --model {args.model}')


if __name__ == '__main__':
    run_script(main)
