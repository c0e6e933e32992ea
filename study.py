"""The study: do the auxiliary tasks help the masks, and how should the tasks be weighted?

    python data_prepare.py --source oxford --root DIR --size 128 --folds 5 --out datasets/folds
    python data_rechunk.py --data datasets/folds
    python study.py --data datasets/folds --jobs 2      # trains what is missing, goes on after any stop
    python study.py --table                             # draws the tables alone, from --out

Each arm, a way to train, is trained on each fold with the same steps and the same masked images in the same
augmentation; arms that use more images add them to the batches. Finished runs are kept in --out as scores.csv.gz, the
test metrics of each image, and runs.csv; table.md, effects.png and masks.png are drawn from them. What --out has is
not trained again, on whichever machine; logs and unfinished runs are in --runs. One --out for one data and commit.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

import engine
import study_tables
from dataloader_mtl import LOADING, EpochBatches, Sample, load_splits
from models import AblatedNet, AblatedNet2, BoxNet, ClassBoxNet, ClassNet, MTLNet, SharedEncoderNet, UNet, load_model
from oeq_weighting import FIXED, weighting
from study_tables import RunKey
from support.cli import InputError, StopRequest, run_script, whole_number
from support.files import lock_folder
from utils import WeightedLoss

MASKED, OTHERS = 8, 16  # images of a batch: with a mask, and those that arms with more images add
EPOCHS, STEPS = 10, 90  # validations of a run, and steps from one to the next
RATES = (1e-3, 3e-3, 1e-2)  # learning rates to choose from
IMAGENET = ('tf_efficientnet_lite0', 'imagenet')
# 128 x 128 throughout, as the folds are prepared, and float32, so that all machines train alike. Otherwise the recipes
# of the training scripts; from scratch without CutMix and with milder crops, as the training is short.
SCRATCH = engine.SCRATCH._replace(sizes=((1, 1),), crop=(0.4, 1.0), cutmix=0, bfloat16=False)
PRETRAINED = engine.PRETRAINED._replace(sizes=((1, 1),), bfloat16=False)


class Arm(NamedTuple):
    """A way to train; `others`: whether images without a mask are added.

    Its Dice is compared with those of `references`, the first of them the mask alone.
    """

    text: str
    network: type[SharedEncoderNet]
    others: bool = True
    weights: str = 'equal'  # a name of oeq_weighting.py
    encoder: tuple = ('unet', 'none')
    masks: int | None = None  # masked images in training; None: all
    longer: int = 1  # times the steps
    sequential: bool = False  # the first half of the steps on class and box
    rate_of: str = 'mtl'  # the arm whose chosen learning rate it takes
    references: tuple = ('unet',)


ARMS = {
    'unet': Arm('mask alone', UNet, others=False, rate_of='unet', references=()),
    'mtl': Arm('all tasks, equal weights', MTLNet, references=('unet', 'unet-long', 'unet-others', 'mtl-masked')),
    'unet-long': Arm('mask alone, the time of all tasks', UNet, others=False, longer=2, rate_of='unet'),
    'mtl-masked': Arm('all tasks, masked images alone', MTLNet, others=False),
    'without-bbox': Arm('mask and class', AblatedNet, references=('unet', 'mtl')),
    'without-class': Arm('mask and box', AblatedNet2, references=('unet', 'mtl')),
    **{
        name: Arm(f'all tasks, weights {name}', MTLNet, weights=name, references=('unet', 'mtl'))
        for name in (*FIXED, 'uncertainty')
    },
    'unet-others': Arm('mask alone, other images without labels', UNet, rate_of='unet'),
    'sequential': Arm('class and box, then mask', UNet, sequential=True),
    'unet-60': Arm('mask alone, 60 masks', UNet, others=False, masks=60, rate_of='unet', references=()),
    'mtl-60': Arm('all tasks, 60 masks', MTLNet, masks=60, references=('unet-60',)),
    'unet-240': Arm('mask alone, 240 masks', UNet, others=False, masks=240, rate_of='unet', references=()),
    'mtl-240': Arm('all tasks, 240 masks', MTLNet, masks=240, references=('unet-240',)),
    'unet-imagenet': Arm(
        'mask alone, ImageNet', UNet, others=False, encoder=IMAGENET, rate_of='unet-imagenet', references=()
    ),
    'mtl-imagenet': Arm(
        'all tasks, ImageNet', MTLNet, encoder=IMAGENET, rate_of='mtl-imagenet', references=('unet-imagenet',)
    ),
    'class': Arm('class alone', ClassNet, rate_of='class', references=()),
    'box': Arm('box alone', BoxNet, rate_of='box', references=()),
}
# In this order; (arms, folds).
PARTS = (
    (('unet', 'mtl', 'unet-long', 'mtl-masked', 'without-bbox', 'without-class'), 5),
    ((*FIXED, 'uncertainty', 'unet-others', 'sequential'), 3),
    (('unet-60', 'mtl-60', 'unet-240', 'mtl-240'), 3),
    (('unet-imagenet', 'mtl-imagenet'), 3),
    (('class', 'box'), 3),
)


# ---- one run


class PairedBatches(EpochBatches):
    """EpochBatches of masked images, to which others are added: both are lists of lists of positions.

    The masked images come in the same augmentation, with or without the others.
    """

    def __init__(self, subset, masked, others, seed, epoch):
        super().__init__(subset, [one + two for one, two in zip(masked, others)], seed, epoch)
        self.parts = list(zip(masked, others))

    def __getitem__(self, number):
        self.seed(number, LOADING)
        batches = [self.subset[part] for part in self.parts[number] if part]
        return Sample(*map(torch.cat, zip(*batches)))


def repeat_shuffled(positions, count, size, *key):
    """`count` lists of `size` of the `positions`: shuffled, all of them before one comes again; seeded by `key`."""
    generator = np.random.default_rng(key)
    passes = [generator.permutation(positions) for _ in range(math.ceil(count * size / max(1, len(positions))))]
    return np.concatenate(passes)[: count * size].reshape(count, size).tolist()


def draw_batches(steps, with_others, subset, repeats, batch_size, seed, epoch):
    """The PairedBatches of an epoch of `steps`; the others are the arguments of `draw_epoch`, not all used."""
    has_mask = subset.dataset.labelled['mask'][subset.indices]
    masked = repeat_shuffled(np.flatnonzero(has_mask), steps, MASKED, seed, epoch, 0)
    others = [[]] * steps
    if with_others and not has_mask.all():
        others = repeat_shuffled(np.flatnonzero(~has_mask), steps, OTHERS, seed, epoch, 1)
    return PairedBatches(subset, masked, others, seed, epoch)


def load_fold(masks, root, tasks, limit):
    """`load_splits` with all images in training, so that batches are the same whichever the tasks.

    With `masks`, that many of the masks, the same ones in all arms; None: all of them.
    """
    splits = load_splits(root, tasks, limit)
    train, known = splits['train'].dataset, splits['train'].dataset.labelled['mask']
    if masks is not None:
        known[np.random.default_rng(0).permutation(np.flatnonzero(known))[masks:]] = False
    splits['train'] = Subset(train, range(len(train)))
    return splits


def load_encoder(path, model):
    """Start a network with the encoder of the model file at `path`."""
    model.encoder.load_state_dict(load_model(path).encoder.state_dict())


def train_run(key, data, folder, epochs=EPOCHS, steps=STEPS):
    """Train a RunKey into `folder`, or continue; returns the content of metrics.json.

    Each fold has its seed, so that initial weights and augmentation are the same for all arms and vary over folds.
    """
    arm = ARMS[key.arm]
    recipe = SCRATCH if arm.encoder[1] == 'none' else PRETRAINED

    def train(network, loss, out, epochs, with_others, start=None):
        options = {
            '--data': Path(data) / f'fold{key.fold}',
            '--epochs': epochs,
            '--batch-size': MASKED + OTHERS * with_others,
            '--lr': key.rate,
            '--encoder': arm.encoder[0],
            '--encoder-weights': arm.encoder[1],
            '--seed': key.fold,
            '--device': 'cpu',
            '--workers': 0,
            '--out': out,
            '--resume': 'auto',
        }
        args = engine.training_parser('', out='').parse_args([str(part) for pair in options.items() for part in pair])
        plan = engine.Plan(
            recipe,
            load=partial(load_fold, arm.masks),
            draw=partial(draw_batches, steps * arm.longer, with_others),
            start=start,
            about={'arm': key.arm, 'steps': steps * arm.longer},
        )
        return engine.train(network, loss, args, plan)

    if not arm.sequential:
        loss = weighting(arm.weights) if arm.network is MTLNet else WeightedLoss.equal(arm.network.tasks)
        return train(arm.network, loss, folder, epochs, arm.others)
    first = train(ClassBoxNet, WeightedLoss.equal(ClassBoxNet.tasks), folder / 'first', epochs // 2, True)
    start = partial(load_encoder, folder / 'first' / 'best.pt')
    second = train(arm.network, WeightedLoss.equal(arm.network.tasks), folder, epochs - epochs // 2, False, start)
    return second | {'training_seconds': first['training_seconds'] + second['training_seconds']}


# ---- all runs


def missing_runs(runs, arms, folds):
    """The RunKeys of `arms` that are not among `runs`, in order; those whose rate is not chosen yet have None."""
    keys = []
    for names, count in PARTS:
        wanted = [name for name in names if name in arms]
        kinds = dict.fromkeys(ARMS[name].rate_of for name in wanted)
        searched = {kind: [RunKey(kind, 0, rate) for rate in RATES] for kind in kinds}
        keys += chain(*searched.values())
        rates = {
            kind: study_tables.chosen_rate(runs, kind, ARMS)
            for kind, own in searched.items()
            if runs.keys() >= set(own)
        }
        for fold in folds:
            for name in wanted:
                if fold < count and (fold or name not in searched):
                    keys.append(RunKey(name, fold, rates.get(ARMS[name].rate_of)))
    return [key for key in dict.fromkeys(keys) if key not in runs]


def folder_of(root, key):
    return root / f'{key.arm}-fold{key.fold}-{key.rate:g}'


def run_process(key, data, folder, threads):
    """Train a run in a process of its own; what it prints goes to log.txt in its folder."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'a', buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        run_script(partial(train_and_write, key, data, folder))


def train_and_write(key, data, folder):
    """Train a run and write its result.json; a run that diverges has no metrics."""
    try:
        study_tables.write_result(train_run(key, data, folder), folder)
    except engine.Diverged as error:
        print(error)
        study_tables.write_result(None, folder)


def start_run(key, data, folder, threads):
    process = multiprocessing.get_context('spawn').Process(target=run_process, args=(key, data, folder, threads))
    process.start()
    return process


class ActiveRuns(dict):
    """{RunKey: (process, when it started)}."""

    def pop_ended(self):
        """[(RunKey, exit status, seconds)] of the runs that have ended, which are removed."""
        ended = []
        for key in [key for key, (process, _) in self.items() if not process.is_alive()]:
            process, began = self.pop(key)
            ended.append((key, process.exitcode, time.monotonic() - began))
        return ended

    def stop(self):
        """Ask all to write their checkpoint and end."""
        for process, _ in self.values():
            process.terminate()
        for process, _ in self.values():
            process.join()


def train_all(args, threads):
    """Train all that is missing, `args.jobs` runs at a time; returns the RunKeys of those that failed."""
    runs, active, failed, seconds = study_tables.read_runs(args.out), ActiveRuns(), [], []
    with StopRequest() as stop, ExitStack() as at_end:
        at_end.callback(active.stop)
        while True:
            stop.check()
            missing = missing_runs(runs, args.only, args.folds)
            ready = [key for key in missing if key.rate and key not in active and key not in failed]
            for key in ready[: args.jobs - len(active)]:
                active[key] = start_run(key, args.data, folder_of(args.runs, key), threads), time.monotonic()
            if not active:
                return failed
            time.sleep(1)
            for key, status, spent in active.pop_ended():
                folder = folder_of(args.runs, key)
                if status:
                    failed.append(key)
                    print(f'{folder}: stopped with status {status}; see log.txt there', file=sys.stderr)
                    continue
                study_tables.add_result(args.out, key, folder)
                for path in folder.rglob('last.pt'):  # so that another --out does not take the run over
                    path.unlink()
                runs = study_tables.read_runs(args.out)
                seconds.append(spent)
                left = len(missing_runs(runs, args.only, args.folds))
                hours = left * statistics.fmean(seconds) / args.jobs / 3600
                dice = runs[key]['val_dice']
                shown = '' if dice is None else f'validation Dice {dice:.4f}, '
                print(
                    f'{key.arm}, fold {key.fold}, rate {key.rate:g}: {shown}{spent / 60:.1f} min; '
                    f'{left} runs left, about {hours:.1f} h',
                    flush=True,
                )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default='datasets/folds', metavar='DIR', help='folder of fold0, fold1 ... (default: %(default)s)')
    add('--out', type=Path, default=Path('results/study'), metavar='DIR', help='default: %(default)s')
    add(
        '--runs', type=Path, default=Path('runs/study'), metavar='DIR', help='of unfinished runs (default: %(default)s)'
    )
    add('--only', nargs='+', choices=ARMS, default=list(ARMS), metavar='ARM', help=f'some of {", ".join(ARMS)}')
    folds_help = 'some of the folds; learning rates are chosen on fold 0'
    add('--folds', nargs='+', type=int, choices=range(5), default=range(5), metavar='K', help=folds_help)
    add('--jobs', type=whole_number(1), default=1, help='runs side by side (default: %(default)s)')
    add('--table', action='store_true', help='train nothing, draw the tables')
    args = parser.parse_args(argv)
    failed = []
    if not args.table:
        for fold in sorted({0, *args.folds}):
            if not Path(args.data, f'fold{fold}').is_dir():
                raise InputError(f'{args.data}/fold{fold}: no such folder; make it with data_prepare.py --folds 5')
        with lock_folder(args.out):
            failed = train_all(args, max(1, torch.get_num_threads() // args.jobs))
    study_tables.draw(args.out, ARMS)
    if failed:
        raise InputError(f'{len(failed)} runs failed; the same command goes on with them')


if __name__ == '__main__':
    run_script(main)
