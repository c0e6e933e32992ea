"""A training run from top to bottom: options, one epoch, checkpoints.

The training scripts say which network and which weighting of the tasks' losses; the rest is here:

    args = engine.training_parser(__doc__, out='runs/mtl').parse_args()
    engine.train(MTLNet, WeightedLoss.equal(MTLNet.tasks), args)

A run writes last.pt (all that --resume needs), log.csv, curves.png, best.pt (the model with the best
validation Dice) and, at the end, metrics.json with the test metrics of best.pt and test_scores.csv with those
of each image. On a CPU, a run that was stopped or killed and resumed ends with the same weights as one that
was not, bit for bit: every random number comes from a seed made of --seed, the epoch and the step.
Augmentation, image size and batches of an epoch are in dataloader_mtl.py, losses and metrics in utils.py, the
optimiser in optimizers.py, validation and the test in evaluation.py.
"""

import argparse
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataloader_mtl import (
    JITTER,
    TRAINING,
    RandomCropFlip,
    count_labels,
    draw_epoch,
    image_names,
    iter_loader,
    load_splits,
    training_size,
)
from evaluation import evaluate, forward, run_test, to_device
from models import load_model, model_content
from optimizers import make_average, make_optimizer, make_schedule
from support.checkpoint import TRAINING_FORMAT, find_checkpoint, is_finite, load_checkpoint, save_checkpoint, save_last
from support.cli import InputError, Stopped, StopRequest, positive_number, reason, whole_number
from support.device import choose_device, has_fast_bfloat16, keep_freed_memory, seed_everything
from support.distributed import all_gather, get_world_size, is_main_process, on_main_process, print_once, process_group
from support.files import lock_folder
from support.report import draw_curves, entries, epoch_line, print_test, write_log, write_metrics, write_scores
from utils import METRICS, PRINTED, TASKS, MeanLosses, task_losses


class Recipe(NamedTuple):
    """What depends on whether the encoder has learned from other images before."""

    sizes: tuple  # see `training_size`
    crop: tuple  # smallest and largest area of a crop, as a share of the image's
    mask_repeats: int  # see `epoch_positions`
    cutmix: float  # see MTLDataset
    muon: bool  # whether Muon trains the convolutions, or AdamW
    encoder_lr: float  # as a share of --lr
    bfloat16: bool = True  # where the device is fast in it


# Many epochs of small images teach more than few of larger ones (progressive resizing: Howard, fast.ai on DAWNBench,
# 2018). At the end it is three quarters of the size, at which crops show their objects about as large as the whole
# images of evaluation do. An encoder that has learned from larger images trains at that size throughout.
SCRATCH = Recipe(
    sizes=((0.3, 3 / 8), (0.65, 1 / 2), (1, 3 / 4)),
    crop=(0.25, 1.0),
    mask_repeats=2,
    cutmix=0.5,
    muon=True,
    encoder_lr=1,
)
PRETRAINED = Recipe(sizes=((1, 3 / 4),), crop=(0.4, 1.0), mask_repeats=3, cutmix=0, muon=False, encoder_lr=0.2)


class Plan(NamedTuple):
    """What a run does that is not among its options; study.py has others."""

    recipe: Recipe
    load: Callable = load_splits  # (root, tasks, limit) -> {split: Subset}
    draw: Callable = draw_epoch  # (Subset, mask_repeats, batch_size, seed, epoch) -> EpochBatches, always as many
    start: Callable | None = None  # called with the new network, to set its weights
    about: dict = {}  # more for the configuration, which --resume compares


def training_parser(description, out):
    """The options that all training scripts share; the defaults are the recipe of the README."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default='datasets/data_new', metavar='DIR', help='folder of the splits (default: %(default)s)')
    add('--epochs', type=whole_number(1), default=30, help='passes over the data (default: %(default)s)')
    add('--batch-size', type=whole_number(1), default=32, help='over all processes (default: %(default)s)')
    add('--lr', type=positive_number, default=3e-3, help='highest learning rate (default: %(default)s)')
    encoder_help = "'unet', from scratch, or a timm model, such as tf_efficientnet_lite0 (default: %(default)s)"
    add('--encoder', default='unet', metavar='NAME', help=encoder_help)
    weights_help = "of a timm encoder at the start: 'imagenet' (default), 'none' or a file of weights"
    add('--encoder-weights', metavar='WEIGHTS', help=weights_help)
    lr_help = 'of the encoder (default: --lr, a fifth of it for an encoder with weights)'
    add('--encoder-lr', type=positive_number, metavar='LR', help=lr_help)
    add('--seed', type=whole_number(0), default=0, help='random seed of the run (default: %(default)s)')
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='where to train (default: %(default)s)')
    add('--workers', type=whole_number(0), default=1, help='processes that load data (default: %(default)s)')
    add('--out', default=out, metavar='DIR', help=f"the run's folder (default: {out})")
    resume_help = 'continue from last.pt in --out; auto: start if there is none'
    add('--resume', nargs='?', const='last', choices=('last', 'auto'), help=resume_help)
    minutes_help = 'minutes between two checkpoints within an epoch (default: %(default)s)'
    add('--checkpoint-minutes', type=positive_number, default=10, metavar='M', help=minutes_help)
    limit_help = 'for a trial: use at most N times --batch-size images of each split'
    add('--limit-batches', type=whole_number(1), metavar='N', help=limit_help)
    return parser


class Diverged(InputError):
    """A loss or weights that are not finite."""


# ---- one step


class Objective(nn.Module):
    """A network and its weighting: a batch -> (total loss, losses of `task_losses`).

    One module, so that DistributedDataParallel averages the gradients of both. Each rank has a share of the
    batch; the mean of the ranks' totals is the total of the batch.
    """

    def __init__(self, model, weighting, bfloat16):
        super().__init__()
        self.model, self.weighting, self.bfloat16 = model, weighting, bfloat16

    def forward(self, batch):
        device = batch.image.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs, batch = forward(self.model, batch)
        losses = task_losses(outputs, batch)
        counts = torch.tensor([losses[task][1] if task in losses else 0 for task in TASKS], device=device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        scaled = {}
        for task, total in zip(TASKS, counts.tolist()):
            if task in losses:
                loss, count = losses[task]
                scaled[task] = loss * (count * get_world_size() / total)
            elif total:  # only other ranks have labels
                scaled[task] = self.zero_loss()
        return (self.weighting(scaled) if scaled else self.zero_loss()), losses

    def zero_loss(self):
        """Zero attached to the graph, for a batch without labels."""
        return sum(0 * parameter.sum() for parameter in self.model.parameters())


# ---- one epoch


def train_one_epoch(run, loader, description, before_step=lambda: None):
    """Train on what is left of an epoch, a step for each batch of `loader`, a loader of EpochBatches.

    `run.steps` counts the steps done. Returns {'loss_<task>': mean} of the whole epoch. Raises Diverged for
    a loss that is not finite.
    """
    run.model.train()
    batches = loader.dataset
    total_samples, done = batches.count(len(batches)), batches.count(run.steps)
    disable = None if is_main_process() else True  # None: a bar on a terminal, none in a log
    with tqdm(total=total_samples, initial=done, desc=description, unit='img', leave=False, disable=disable) as bar:
        for batch in iter_loader(loader):
            before_step()
            batches.seed(run.steps, TRAINING)
            total, losses = run.objective(to_device(batch, run.device))
            if not all(all_gather(bool(total.isfinite()))):
                raise not_finite(description, run.steps, batches, total, losses)
            run.update(total)
            run.losses.add(losses)
            run.steps += 1
            done += len(batch.image)
            bar.set_postfix(loss=f'{total.item():.3f}', refresh=False)
            bar.update(len(batch.image))
    assert done == total_samples, 'the loader must give each sample once'
    return run.losses.result()


def not_finite(description, step, batches, total, losses):
    """The Diverged for a loss that is not finite."""
    shown = ', '.join(f'{task} {loss.item():.3g}' for task, (loss, _) in losses.items())
    return Diverged(
        f'{description}, step {step + 1} of {len(batches)}: the loss is {total.item()} ({shown}) for the samples '
        f'{" ".join(map(str, sorted(batches.indices(step))))} of {batches.subset.dataset.folder}; earlier checkpoints '
        'are kept; try a lower --lr, with --resume or another --out, or look at these samples'
    )


# ---- a run


def choose_weights(encoder, weights):
    """The encoder's weights at the start, for --encoder and --encoder-weights."""
    if encoder != 'unet':
        return 'imagenet' if weights is None else weights
    if weights not in (None, 'none'):
        raise InputError(f'--encoder-weights {weights}: --encoder unet starts from scratch; give a timm encoder, too')
    return 'none'


def make_model(network, dataset, encoder='unet', weights='none', read_weights=True):
    """A network for an MTLDataset; the shallow layers of an encoder with weights are frozen.

    Without `read_weights`, it starts at random nevertheless: for weights that come from a checkpoint.
    """
    source = weights if read_weights else 'none'
    model = network(n_classes=len(dataset.class_names), encoder=encoder, encoder_weights=source)
    if weights != 'none':
        model.encoder.freeze_shallow()
    return model


def chosen_by(row):
    """The metric that chooses the best epoch: the first of METRICS that validation has labels for.

    None without any; the last epoch is the best then.
    """
    return next((name for name in METRICS if f'val_{name}' in row), None)


class Run:
    """All that training changes. `state` returns what last.pt holds, `restore` reads it back."""

    STATEFUL = ('model', 'weighting', 'optimizer', 'schedule', 'average')

    def __init__(self, model, weighting, dataset, total_steps, lr, encoder_lr, muon, device, bfloat16=True):
        self.about = dataset.class_names, dataset.class_species, dataset.image_size  # for the model file
        self.device, self.bfloat16 = device, bfloat16 and has_fast_bfloat16(device)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.weighting = weighting.to(device)
        self.objective = Objective(self.model, self.weighting, self.bfloat16)
        if dist.is_initialized():
            # A batch without masks leaves the decoder without gradients.
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.optimizer = make_optimizer(self.model, weighting, lr, encoder_lr, muon)
        self.schedule = make_schedule(self.optimizer, total_steps)
        self.average = make_average(self.model, total_steps)
        self.history, self.best, self.best_model = [], None, None  # a row for each epoch; the best of them
        self.start_epoch()

    def start_epoch(self, steps=0, losses=None, seconds=0.0):
        """Of the current epoch: steps done, their losses, seconds spent before this process."""
        self.steps, self.losses = steps, losses or MeanLosses()
        self.started = time.perf_counter() - seconds

    def seconds(self):
        """Seconds that went into the current epoch, in this process and before."""
        return time.perf_counter() - self.started

    def position(self):
        """(epoch from 1, steps of it that are done)."""
        return len(self.history) + 1, self.steps

    def update(self, total):
        """One step of the optimiser, down the gradient of the loss `total`."""
        self.optimizer.zero_grad()
        total.backward()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)

    def end_epoch(self, row):
        """Add the epoch's row to the history; keep its model if it is the best so far."""
        self.history.append(row)
        self.start_epoch()
        name = chosen_by(row)
        if self.best is None or name is None or row[f'val_{name}'] > self.best[f'val_{name}']:
            self.best = row
            self.best_model = model_content(self.average.module, *self.about)

    def state(self, config):
        """The content of last.pt. All ranks call it: it gathers their losses."""
        sums, counts = self.losses.totals()
        return {
            'format': TRAINING_FORMAT,
            'config': config,
            'history': self.history,
            'best': self.best,
            'best_model': self.best_model,
            'steps': self.steps,
            'sums': sums,
            'counts': counts,
            'seconds': self.seconds(),
            'threads': torch.get_num_threads(),
            **{name: getattr(self, name).state_dict() for name in self.STATEFUL},
        }

    def restore(self, path, config):
        """Continue from the checkpoint at `path`; raises InputError if it is damaged or of another configuration."""
        content = load_checkpoint(path, TRAINING_FORMAT, self.device)
        try:
            old = content['config']
            changed = [f'{key} was {old.get(key)} and is {new}' for key, new in config.items() if old.get(key) != new]
            if changed:
                raise InputError(
                    f'{path}: another configuration, {", ".join(changed)}; use the same options, or another --out'
                )
            if content.get('threads') != torch.get_num_threads():
                print_once(f'{path}: of a run with another number of threads; the weights will differ in the last bits')
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(content[name])
            if not all(is_finite(content[name]) for name in ('model', 'weighting', 'average')):
                raise ValueError('some of its weights are not finite')
            self.history, self.best, self.best_model = (content[key] for key in ('history', 'best', 'best_model'))
            # Rank 0 continues with the sums over all ranks.
            losses = MeanLosses(content['sums'], content['counts']) if is_main_process() else None
            self.start_epoch(content['steps'], losses, content['seconds'])
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(
                f'{path}: does not fit this training ({reason(error)}); start again with another --out'
            ) from None


class Checkpoints:
    """Writes last.pt: after each epoch, every `minutes` within one, and when a signal asks the run to stop."""

    def __init__(self, run, config, folder, minutes, stop):
        self.run, self.config, self.folder = run, config, folder
        self.minutes, self.stop = minutes, stop
        self.saved_position, self.saved_at = run.position(), time.monotonic()

    def before_step(self):
        due = time.monotonic() - self.saved_at > 60 * self.minutes and self.run.position() != self.saved_position
        # A signal or the time may come to one rank only; all of them act on it before the same step.
        numbers, dues = zip(*all_gather((self.stop.number, due)))
        self.stop.number, due = max(numbers), max(dues)
        self.stop.check()
        if due:
            self.save()

    def save(self):
        """Write last.pt and, after an epoch, what is made from it. Raises Diverged for weights not finite."""
        run = self.run
        epoch, steps = run.position()
        if not is_finite(run.model.state_dict()) or not is_finite(run.average.state_dict()):
            raise Diverged(
                f'epoch {epoch}, step {steps}: the loss was finite and the weights are not any more; earlier '
                'checkpoints are kept; try a lower --lr, with --resume or another --out'
            )
        state = run.state(self.config)
        on_main_process(lambda: save_last(self.folder, state))
        if steps == 0:
            on_main_process(lambda: write_epoch(run, self.folder))
        self.saved_position, self.saved_at = run.position(), time.monotonic()

    def save_and_stop(self, stopped):
        """Write last.pt if there is something new; returns the Stopped that says how to continue."""
        if self.run.position() != self.saved_position:
            self.save()
        epoch, steps = self.saved_position
        if (epoch, steps) == (1, 0):
            return stopped
        where = f'in epoch {epoch}, after {steps} steps of it; {self.folder}/last.pt is written'
        if epoch > self.config['epochs']:
            where = 'in the test'
        return Stopped(stopped.number, f'stopped {where}; continue with the same command and --resume')


def write_epoch(run, folder):
    """Write what is made from last.pt; a resumed run writes it again, as it may be older than last.pt."""
    save_checkpoint(folder / 'best.pt', run.best_model)
    write_log(run.history, folder / 'log.csv')
    draw_curves(run.history, PRINTED, folder / 'curves.png')


def train(network, weighting, args, plan=None):
    """Train `network` with `weighting`, test the best epoch once; returns the content of metrics.json.

    Without a Plan, that of --encoder-weights.
    """
    out, encoder_weights = Path(args.out), choose_weights(args.encoder, args.encoder_weights)
    plan = plan or Plan(SCRATCH if encoder_weights == 'none' else PRETRAINED)
    recipe = plan.recipe
    with process_group(args.device), StopRequest() as stop, ExitStack() as lock:
        on_main_process(lambda: lock.enter_context(lock_folder(out)))
        keep_freed_memory()
        seed_everything(args.seed)
        device = choose_device(args.device)
        splits = plan.load(args.data, network.tasks, args.limit_batches and args.limit_batches * args.batch_size)
        train_set = splits['train'].dataset
        checkpoint = on_main_process(lambda: find_checkpoint(out, args.resume))
        train_set.jitter, train_set.cutmix = JITTER, recipe.cutmix
        encoder_lr = args.encoder_lr or args.lr * recipe.encoder_lr
        model = make_model(network, train_set, args.encoder, encoder_weights, read_weights=not checkpoint)
        if plan.start and not checkpoint:
            plan.start(model)
        draw = partial(plan.draw, splits['train'], recipe.mask_repeats, args.batch_size, args.seed)
        steps = len(draw(epoch=1))
        rates = args.lr, encoder_lr
        run = Run(model, weighting, train_set, steps * args.epochs, *rates, recipe.muon, device, recipe.bfloat16)
        # Tells files that were made elsewhere, which have no preparation, from others.
        labels_checksum = zlib.crc32(train_set.labels.tobytes() + train_set.bboxes.tobytes())
        config = {
            'network': network.__name__,
            'weighting': type(weighting).__name__,
            'weights': {task: round(weight, 4) for task, weight in getattr(weighting, 'weights', {}).items()},
            'precision': 'bfloat16' if run.bfloat16 else 'float32',
            'device': device.type,
            'processes': get_world_size(),
            'train_samples': len(splits['train']),
            'preparation': train_set.preparation or f'checksum {labels_checksum:08x}',
            **{name: getattr(args, name) for name in ('data', 'epochs', 'batch_size', 'lr', 'seed', 'limit_batches')},
            'encoder': args.encoder,
            'encoder_weights': encoder_weights,
            'encoder_lr': encoder_lr,
            **plan.about,
        }
        if checkpoint:
            run.restore(checkpoint, config)
            print_once(f'resuming from {checkpoint}, epoch {len(run.history) + 1}, step {run.steps} of {steps}')
            if run.history:
                on_main_process(lambda: write_epoch(run, out))
        print_once(', '.join(f'{name} {value}' for name, value in config.items()))
        checkpoints = Checkpoints(run, config, out, args.checkpoint_minutes, stop)
        # Several ranks check for a signal in `before_step` alone, so that all of them stop before the same step.
        check = stop.check if get_world_size() == 1 else lambda: None
        try:
            for epoch in range(len(run.history) + 1, args.epochs + 1):
                size = training_size(epoch, args.epochs, train_set.image_size, recipe.sizes)
                train_set.transform = RandomCropFlip(*size, recipe.crop)
                batches = draw(epoch=epoch)
                loader = batches.loader(run.steps, args.workers, device)
                losses = train_one_epoch(run, loader, f'epoch {epoch}/{args.epochs}', checkpoints.before_step)
                train_seconds = run.seconds()
                if dist.is_initialized():  # BatchNorm's statistics differ between ranks; rank 0's are saved
                    for buffer in run.average.buffers():
                        dist.broadcast(buffer, 0)
                options = {'workers': args.workers, 'bfloat16': run.bfloat16, 'before_batch': check}
                metrics = evaluate(run.average.module, splits['val'], device, **options)
                row = {
                    'epoch': epoch,
                    'lr': run.schedule.get_last_lr()[0],
                    **{f'train_{name}': value for name, value in losses.items()},
                    **{f'val_{name}': value for name, value in metrics.items()},
                    'train_seconds': train_seconds,
                    'images_per_second': sum(all_gather(batches.count(steps))) / train_seconds,
                    'total_seconds': run.seconds(),
                }
                run.end_epoch(row)
                checkpoints.save()
                print_once(epoch_line(row, args.epochs))
            model = load_model(out / 'best.pt', device)
            test, scores = run_test(model, splits, device, workers=args.workers, before_batch=check)
        except Stopped as stopped:
            raise checkpoints.save_and_stop(stopped) from None

        best = run.best
        metrics = {
            'test': test,
            'validation': entries(best, 'val_'),
            'best_epoch': best['epoch'],
            'training_seconds': sum(row['total_seconds'] for row in run.history),
            'config': config | {'workers': args.workers},
            'data': {split: count_labels(subset) for split, subset in splits.items()},
            'parameters': sum(p.numel() for p in model.parameters()),
            'learned_weighting': {name: p.item() for name, p in weighting.named_parameters()},
        }
        if is_main_process():
            name = chosen_by(best)
            chosen = f'best validation {name}' if name else 'the last, without validation labels'
            print_test(f'Test, epoch {best["epoch"]} of {args.epochs} ({chosen})', test, PRINTED)
            write_scores(scores, *image_names(splits['test']), out / 'test_scores.csv')
            metrics = write_metrics(metrics, out / 'metrics.json')
            print(f'written to {out}')
        if stop.number:
            raise Stopped(stop.number, f'stopped; the run in {out} is finished, and --resume only tests it again')
        return metrics
