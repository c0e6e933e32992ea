import argparse
import shlex
import sys
from pathlib import Path

import study
from study.arms import ARMS, EPOCHS, STEPS
from support.cli import InputError, positive_number, reason, run_script, whole_number
from support.files import lock_folder, write_file


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog='python -m study', description=study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--data', default='datasets/folds', metavar='DIR', help='folder of fold0, fold1 ... (default: %(default)s)')
    add('--out', type=Path, default=Path('results/study'), metavar='DIR', help='the results (default: %(default)s)')
    add('--runs', type=Path, default=Path('runs/study'), metavar='DIR', help='unfinished runs (default: %(default)s)')
    add('--only', nargs='+', choices=ARMS, default=list(ARMS), metavar='ARM', help=f'some of {", ".join(ARMS)}')
    folds_help = 'some of the folds; learning rates are chosen on fold 0'
    add('--folds', nargs='+', type=int, choices=range(5), default=range(5), metavar='K', help=folds_help)
    add('--jobs', type=whole_number(1), default=1, help='runs side by side (default: %(default)s)')
    device_help = 'where to train (default: %(default)s); the same for all runs of an --out'
    add('--device', choices=('auto', 'cpu', 'cuda'), default='cpu', help=device_help)
    steps_help = f'between two of the {EPOCHS} validations (default: %(default)s); the same for all runs of an --out'
    add('--steps', type=whole_number(1), default=STEPS, help=steps_help)
    minutes_help = 'stop after M minutes; the same command resumes'
    add('--minutes', type=positive_number, metavar='M', help=minutes_help)
    add('--table', action='store_true', help='train nothing, draw the tables and plots')
    args = parser.parse_args(argv)
    try:
        from study import runner, tables
    except ImportError as error:
        raise InputError(f'{reason(error)}; the study needs: pip install -r study/requirements.txt') from None
    failed = []
    if not args.table:
        for fold in sorted({0, *args.folds}):
            if not Path(args.data, f'fold{fold}').is_dir():
                raise InputError(f'{args.data}/fold{fold}: no such folder; make it with data_prepare.py --folds 5')
        command = shlex.join(['python', '-m', 'study', *(sys.argv[1:] if argv is None else argv)])
        with lock_folder(args.out):
            write_file(args.out / 'command.txt', lambda file: file.write(f'{command}\n'.encode()))
            failed = runner.train_all(args)
    tables.draw(args.out)
    if failed:
        raise InputError(f'{len(failed)} runs failed; the same command retries them')


if __name__ == '__main__':
    run_script(main)
