"""A training run from top to bottom: options and recipe, one step, one epoch, checkpoints, the run.

The training scripts say which network and which weighting of the tasks' losses; the rest is here:

    args = engine.training_parser(__doc__, out='runs/baseline').parse_args()
    engine.train(UNet, WeightedLoss.equal(UNet.tasks), engine.Config.from_args(args))

A run writes last.pt (all that --resume needs), log.csv, curves.png, best.pt (the model of the epoch with the highest
mean of validation Dice, accuracy and box IoU) and, at the end, metrics.json with the test metrics of best.pt and
test_scores.csv with those of each image. On a CPU, a run that was stopped or killed and resumed ends with the same
weights as one that was not, bit for bit: every random number comes from a seed made of --seed, the epoch and the step.
Augmentation, image size and batches of an epoch are in dataloader_mtl.py, losses and metrics in utils.py, the
optimiser in optimizers.py, validation and the test in evaluation.py.
"""

import argparse
import time
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataloader_mtl import (
    TRAINING,
    RandomCropFlip,
    count_known,
    draw_epoch,
    image_names,
    load_batches,
    load_splits,
    training_size,
    worker_errors,
)
from evaluation import calibrate, evaluate, most_confused, run_test, to_device
from models import NETWORKS, load_model, model_content
from optimizers import make_optimizer, make_schedule
from support import report
from support.checkpoint import TRAINING_FORMAT, find_checkpoint, is_finite, load_checkpoint, save_checkpoint, save_last
from support.cli import InputError, Stopped, StopRequest, positive_number, reason, whole_number
from support.device import choose_device, has_fast_bfloat16, keep_freed_memory, seed_everything
from support.distributed import all_gather, get_world_size, is_main_process, on_main_process, print_once, process_group
from support.files import lock_folder
from utils import METRICS, PRINTED, MeanLosses, task_losses


@dataclass(frozen=True)
class Config:
    """Options and recipe of a run. Saved with it except UNSAVED; --resume compares them."""

    # Options, see `training_parser`.
    data: str = 'datasets/data_new'
    out: str = 'runs/mtl'
    resume: str | None = None  # 'last' or 'auto'
    epochs: int = 30
    batch_size: int = 32  # over all processes
    lr: float = 1e-2  # the best of the study for several tasks
    encoder: str = 'unet'
    encoder_weights: str = 'none'
    encoder_lr: float | None = None  # None: `encoder_lr_share` of `lr`
    start: str | None = None  # a model file
    freeze: bool = False  # the weights of `start`
    seed: int = 0
    device: str = 'auto'
    workers: int = 0  # loading takes little of a step on a CPU, and a GPU augments its batches itself
    checkpoint_minutes: float = 10
    limit_batches: int | None = None
    # The recipe. Small images allow more epochs in the same time (progressive resizing: Howard, fast.ai on DAWNBench,
    # 2018). In crops at 3/4 of the size, objects are about as large as in evaluation; the last epochs are for detail.
    sizes: tuple = ((0.3, 3 / 8), (0.6, 1 / 2), (0.85, 3 / 4), (1, 1))  # see `training_size`
    crop: tuple = (0.4, 1.0)  # smallest and largest area of a crop, as a share of the image's
    zoom_out: float = 0.25  # share of the images, see `zoom_out`
    several: float = 0.0  # share of these in which the other pet stays
    remove_pets: float = 0.05  # share of the images, see `remove_pets`
    poor_light: float = 0.25  # share of the images, see `poor_light`
    muon: bool = True  # whether Muon trains the convolutions, or AdamW
    weight_decay: float = 0.05
    encoder_lr_share: float = 1
    bfloat16: bool = True  # where the device is fast in it
    # Of the study.
    steps: int | None = None  # of an epoch, see `draw_epoch`
    images_of: tuple | None = None  # only images with a label for one of these tasks; None: the network's
    masks: int | None = None  # see `load_splits`

    @classmethod
    def from_args(cls, args):
        """The Config of parsed options; raises InputError for options that do not go together."""
        weights = args.encoder_weights or ('none' if args.encoder == 'unet' or args.start else 'imagenet')
        if args.encoder == 'unet' and weights != 'none':
            raise InputError(f'--encoder-weights {weights}: --encoder unet has none; give a timm encoder, too')
        if args.freeze and not args.start:
            raise InputError('--freeze: nothing to freeze without --start')
        given = {each.name: getattr(args, each.name, None) for each in fields(cls)}
        options = {name: value for name, value in given.items() if value is not None}
        config = cls(**{**options, 'encoder_weights': weights})
        if config.pretrained:
            config = replace(config, **PRETRAINED | options)
        return replace(config, sizes=config.sizes[-1:]) if config.start else config

    @property
    def pretrained(self):
        """Whether the encoder is one of timm that has learned from other images."""
        return self.encoder != 'unet' and (self.encoder_weights != 'none' or self.start is not None)


# What differs in the recipe for an encoder that has learned from other images.
PRETRAINED = {'lr': 3e-3, 'sizes': ((0.8, 3 / 4), (1, 1)), 'muon': False, 'encoder_lr_share': 0.2}

UNSAVED = ('data', 'out', 'resume', 'workers', 'checkpoint_minutes')  # of a Config: nothing trained depends on them
REPORTED = ('commit', 'threads', 'augmented_on')  # a change is reported on resume; the weights may then differ


def training_parser(description, out):
    """The options that all training scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default=Config.data, metavar='DIR', help='folder of the splits (default: %(default)s)')
    add('--epochs', type=whole_number(1), default=Config.epochs, help='passes over the data (default: %(default)s)')
    size_help = 'images of a step, over all processes (default: %(default)s)'
    add('--batch-size', type=whole_number(1), default=Config.batch_size, help=size_help)
    lr_help = f'highest learning rate (default: {Config.lr}, or {PRETRAINED["lr"]} for a timm model with weights)'
    add('--lr', type=positive_number, help=lr_help)
    encoder_help = "'unet', from scratch, or a timm model, such as tf_efficientnet_lite0 (default: %(default)s)"
    add('--encoder', default=Config.encoder, metavar='NAME', help=encoder_help)
    weights_help = "of a timm encoder at first: 'imagenet' (the default), 'none' or a file, its state dict"
    add('--encoder-weights', metavar='WEIGHTS', help=weights_help)
    start_help = 'start from a model file of these scripts, such as mtl_model.pt: from each weight that fits'
    add('--start', metavar='FILE', help=start_help)
    freeze_help = 'train only what the file of --start lacks: heads for other tasks or classes'
    add('--freeze', action='store_true', help=freeze_help)
    lr_help = 'learning rate of the encoder (default: --lr, a fifth of it for a timm model with weights)'
    add('--encoder-lr', type=positive_number, metavar='LR', help=lr_help)
    add('--seed', type=whole_number(0), default=Config.seed, help='random seed of the run (default: %(default)s)')
    device_help = 'where to train (default: %(default)s)'
    add('--device', choices=('auto', 'cpu', 'cuda'), default=Config.device, help=device_help)
    workers_help = 'processes that load and augment data, on the CPU (default: %(default)s)'
    add('--workers', type=whole_number(0), default=Config.workers, help=workers_help)
    add('--out', default=out, metavar='DIR', help=f"the run's folder (default: {out})")
    resume_help = 'continue from last.pt in --out; auto: start if there is none'
    add('--resume', nargs='?', const='last', choices=('last', 'auto'), help=resume_help)
    minutes_help = 'minutes between two checkpoints within an epoch (default: %(default)s)'
    minutes = Config.checkpoint_minutes
    add('--checkpoint-minutes', type=positive_number, default=minutes, metavar='M', help=minutes_help)
    limit_help = 'for a trial: use at most N times --batch-size images of each split'
    add('--limit-batches', type=whole_number(1), metavar='N', help=limit_help)
    return parser


class Diverged(InputError):
    """A loss or weights that are not finite."""


# ---- one step


class Objective(nn.Module):
    """A network and its weighting: a batch -> (total loss, losses of `task_losses`).

    One module, so that DistributedDataParallel averages the gradients of both. Each rank has a part of the
    batch; the losses are scaled so that their mean over the ranks is the loss of the batch.
    """

    def __init__(self, model, weighting, bfloat16):
        super().__init__()
        self.model, self.weighting, self.bfloat16 = model, weighting, bfloat16

    def forward(self, batch):
        device = batch.image.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = self.model(batch.image)
        losses = task_losses(outputs, batch)
        counts = torch.tensor([count for _, count in losses.values()], device=device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        totals = dict(zip(losses, counts.tolist()))  # known labels over all ranks
        scaled = {
            task: loss * (count * get_world_size() / totals[task])
            for task, (loss, count) in losses.items()
            if totals[task]
        }
        zeros = sum(loss for task, (loss, _) in losses.items() if not totals[task])  # keep the parameters in the graph
        return self.weighting(scaled) + zeros, losses


# ---- one epoch


def train_one_epoch(run, before_step=lambda: None):
    """Train the rest of a Run's current epoch; returns {'loss_<task>': mean over the whole epoch}.

    Raises Diverged for a loss that is not finite.
    """
    config, epoch, train_set = run.config, run.epoch, run.splits['train'].dataset
    size = training_size(epoch, config.epochs, train_set.split.image_size, config.sizes)
    train_set.transform = RandomCropFlip(*size, config.crop)
    train_set.device = run.augmentation_device()
    for name in 'zoom_out', 'several', 'remove_pets', 'poor_light':
        setattr(train_set, name, getattr(config, name))
    batches = run.draw(epoch)
    total_samples, done = batches.count(len(batches)), batches.count(run.steps)
    title = f'epoch {epoch}/{config.epochs}'
    disable = None if is_main_process() else True  # None: a bar on a terminal, none in a log
    run.model.train()
    with tqdm(total=total_samples, initial=done, desc=title, unit='img', leave=False, disable=disable) as bar:
        for batch in load_batches(batches, range(run.steps, len(batches)), config.workers, run.device):
            before_step()
            batches.seed(run.steps, TRAINING)
            total, losses = run.objective(to_device(batch, run.device))
            if not all(all_gather(bool(total.isfinite()))):
                raise not_finite(title, run.steps, batches, total, losses)
            run.update(total)
            run.losses.add(losses)
            run.steps += 1
            done += len(batch.image)
            bar.set_postfix(loss=f'{total.item():.3f}', refresh=False)
            bar.update(len(batch.image))
    assert done == total_samples, 'the loader must give each sample once'
    return run.losses.result()


def not_finite(title, step, batches, total, losses):
    """The Diverged for a loss that is not finite."""
    shown = ', '.join(f'{task} {loss.item():.3g}' for task, (loss, _) in losses.items())
    return Diverged(
        f'{title}, step {step + 1} of {len(batches)}: the loss is {total.item()} ({shown}) for the samples '
        f'{" ".join(map(str, sorted(batches.indices(step))))} of {batches.subset.dataset.folder}; earlier checkpoints '
        'are kept; try a lower --lr with another --out, or look at these samples'
    )


def validate(run, before_batch):
    """The metrics on the validation split, as `evaluate` returns them."""
    if dist.is_initialized():  # BatchNorm's statistics differ between ranks; rank 0's are saved
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)
    options = {'workers': run.config.workers, 'bfloat16': run.bfloat16, 'before_batch': before_batch}
    return evaluate(run.model, run.splits['val'], run.device, **options)


# ---- a run


def make_model(network, n_classes, config, read_weights=True):
    """A network for a Config; a timm encoder with weights gets its shallow layers frozen.

    Without `read_weights`, it starts at random, as a checkpoint follows; `freeze` reads them to know which they are.
    """
    weights = config.encoder_weights if read_weights else 'none'
    timm = {} if config.encoder == 'unet' else {'encoder': config.encoder, 'encoder_weights': weights}
    model = network(n_classes=n_classes, **timm)
    copied = copy_weights(config.start, model) if config.start and (read_weights or config.freeze) else ()
    if config.freeze:
        rest = [parameter for name, parameter in model.named_parameters() if name not in copied]
        if not rest:
            raise InputError(f'{config.start}: has all weights, so --freeze leaves nothing to train; leave it out')
        model.requires_grad_(False)
        for parameter in rest:
            parameter.requires_grad_(True)
    elif config.pretrained:
        model.encoder.freeze_shallow()
    return model


def copy_weights(path, model):
    """Give a network those weights of a model file that fit: another network's, or without the other classes' layer.

    Returns their names.
    """
    source, state = load_model(path), model.state_dict()
    if source.encoder_name != model.encoder_name:
        raise InputError(f'{path}: its encoder is {source.encoder_name}; give --encoder {source.encoder_name}')
    found = {name: each for name, each in source.state_dict().items() if name in state}
    found = {name: each for name, each in found.items() if each.shape == state[name].shape}
    model.load_state_dict(state | found)
    return found.keys()


def selection_metrics(row):
    """The metrics whose mean chooses the best epoch: of each task that validation has labels for, the first of METRICS.

    Near the end of a run Dice hardly changes, while breeds and boxes still improve. Without any label, the last epoch
    is the best.
    """
    first = {}
    for name, metric in METRICS.items():
        if f'val_{name}' in row:
            first.setdefault(metric.task, name)
    return list(first.values())


def is_better(row, best):
    """Whether an epoch is better than the best one before it, if there is one."""
    names = selection_metrics(row)
    return best is None or not names or sum(row[f'val_{name}'] - best[f'val_{name}'] for name in names) > 0


def labelled_part(network, splits):
    """The network of those tasks of `network` for which some training image has a label; prints the others."""
    count = count_known(splits['train'])
    missing = [task for task in network.tasks if not count[task]]
    if missing:
        print_once(f'tasks without a training label, left out: {", ".join(missing)}')
    tasks = set(network.tasks) - set(missing)
    return next((each for each in NETWORKS.values() if set(each.tasks) == tasks), network) if missing else network


class Run:
    """The state of a run: `state` is the content of last.pt, `restore` reads it back."""

    STATEFUL = ('model', 'weighting', 'optimizer', 'schedule')

    def __init__(self, network, weighting, config, read_weights=True):
        self.config, self.device = config, choose_device(config.device)
        self.bfloat16 = config.bfloat16 and has_fast_bfloat16(self.device)
        limit = config.limit_batches and config.limit_batches * config.batch_size
        self.splits = load_splits(config.data, config.images_of or network.tasks, limit, config.masks)
        split = self.splits['train'].dataset.split
        self.model_info = split.class_names, split.class_species, split.image_size  # for the model file
        network = labelled_part(network, self.splits)
        model = make_model(network, len(split.class_names), config, read_weights)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.weighting = weighting.to(self.device)
        self.objective = Objective(self.model, self.weighting, self.bfloat16)
        if dist.is_initialized():
            # A batch without labels of a task leaves the task's learned weight without a gradient.
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.epoch_steps = len(self.draw(epoch=1))
        total_steps = self.epoch_steps * config.epochs
        encoder_lr = config.encoder_lr or config.encoder_lr_share * config.lr
        self.optimizer = make_optimizer(self.model, weighting, config.lr, encoder_lr, config.weight_decay, config.muon)
        self.schedule = make_schedule(self.optimizer, total_steps)
        self.history, self.best, self.best_model = [], None, None  # a row for each epoch; the best of them
        self.settings = self.find_settings()
        self.start_epoch()

    def find_settings(self):
        """What made the run, for its files and for --resume: the Config, the network, the data and the machine."""
        # Tells files that were made elsewhere, which have no preparation, from others.
        split = self.splits['train'].dataset.split
        labels_checksum = zlib.crc32(split.labels.tobytes() + split.bboxes.tobytes())
        weights = getattr(self.weighting, 'weights', {})
        return {
            **{key: value for key, value in asdict(self.config).items() if key not in UNSAVED},
            'network': type(self.model).__name__,
            'weighting': type(self.weighting).__name__,
            'task_weights': {task: round(weight, 4) for task, weight in weights.items()},
            'preparation': split.preparation or f'checksum {labels_checksum:08x}',
            'train_samples': len(self.splits['train']),
            'device': self.device.type,
            'augmented_on': self.augmentation_device().type,
            'precision': 'bfloat16' if self.bfloat16 else 'float32',
            'processes': get_world_size(),
            'threads': torch.get_num_threads(),
            'commit': report.read_commit(),
        }

    def augmentation_device(self):
        """Workers augment on the CPU, and so must not be given a GPU."""
        return torch.device('cpu') if self.config.workers else self.device

    def draw(self, epoch):
        """The EpochBatches of an epoch."""
        config = self.config
        return draw_epoch(self.splits['train'], config.batch_size, config.seed, epoch, config.steps)

    def start_epoch(self, steps=0, losses=None, seconds=0.0):
        """Reset the current epoch, or restore it: steps done, their losses, seconds spent before this process."""
        self.steps, self.losses = steps, losses or MeanLosses()
        self.started = time.perf_counter() - seconds

    @property
    def epoch(self):
        """The current epoch, from 1."""
        return len(self.history) + 1

    def seconds(self):
        """Seconds that went into the current epoch, in this process and before."""
        return time.perf_counter() - self.started

    def update(self, total):
        """One step of the optimiser, down the gradient of the loss `total`."""
        self.optimizer.zero_grad()
        total.backward()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            self.optimizer.step()
        self.schedule.step()

    def end_epoch(self, losses, train_seconds, metrics):
        """Add the epoch's row to the history and return it; keep its model if it is the best so far."""
        samples = self.config.steps * self.config.batch_size if self.config.steps else len(self.splits['train'])
        row = {
            'epoch': self.epoch,
            'lr': self.schedule.get_last_lr()[0],  # of --lr; the encoder's is the last
            **{f'train_{name}': value for name, value in losses.items()},
            **{f'val_{name}': value for name, value in metrics.items()},
            'train_seconds': train_seconds,
            'images_per_second': samples / train_seconds,
            'total_seconds': self.seconds(),
        }
        self.history.append(row)
        self.start_epoch()
        if is_better(row, self.best):
            self.best = row
            self.best_model = model_content(self.model, *self.model_info)
        return row

    def state(self):
        """The content of last.pt. All ranks call it: it gathers their losses."""
        sums, counts = self.losses.totals()
        return {
            'format': TRAINING_FORMAT,
            'config': self.settings,
            'history': self.history,
            'best': self.best,
            'best_model': self.best_model,
            'steps': self.steps,
            'sums': sums,
            'counts': counts,
            'seconds': self.seconds(),
            **{name: getattr(self, name).state_dict() for name in self.STATEFUL},
        }

    def restore(self, path):
        """Continue from the checkpoint at `path`; raises InputError if it is damaged or of other settings."""
        content = load_checkpoint(path, TRAINING_FORMAT, self.device)
        try:
            compare_settings(path, content['config'], self.settings)
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(content[name])
            if not all(is_finite(content[name]) for name in ('model', 'weighting')):
                raise ValueError('some of its weights are not finite')
            self.history, self.best, self.best_model = (content[key] for key in ('history', 'best', 'best_model'))
            # Rank 0 continues with the sums over all ranks.
            losses = MeanLosses(content['sums'], content['counts']) if is_main_process() else None
            self.start_epoch(content['steps'], losses, content['seconds'])
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(
                f'{path}: does not fit this training ({reason(error)}); start again with another --out'
            ) from None


def compare_settings(path, old, new):
    """Raises InputError for a checkpoint of other settings, which it names; prints those of REPORTED."""
    changed = {key: f'{key} was {old.get(key)} and is {new[key]}' for key in new if old.get(key) != new[key]}
    for key in REPORTED:
        if text := changed.pop(key, None):
            print_once(f'{path}: {text}; the weights may differ from those of an uninterrupted run')
    if changed:
        advice = 'use the same options, or another --out'
        if 'precision' in changed:
            advice = 'go on where the device is as fast in bfloat16 as before, or start again with another --out'
        raise InputError(f'{path}: another configuration, {", ".join(changed.values())}; {advice}')


class Checkpoints:
    """Writes last.pt: after each epoch, every --checkpoint-minutes within one, and when a signal asks to stop."""

    def __init__(self, run, stop):
        self.run, self.stop, self.folder = run, stop, Path(run.config.out)
        self.mark_saved()

    def mark_saved(self):
        self.saved_position, self.saved_at = (self.run.epoch, self.run.steps), time.monotonic()

    def before_step(self):
        minutes = (time.monotonic() - self.saved_at) / 60
        due = minutes > self.run.config.checkpoint_minutes and (self.run.epoch, self.run.steps) != self.saved_position
        # A signal or the time may come to one rank only; all of them act on it before the same step.
        numbers, dues = zip(*all_gather((self.stop.number, due)))
        self.stop.number, due = max(numbers), max(dues)
        self.stop.check()
        if due:
            self.save()

    def save(self):
        """Write last.pt and, after an epoch, what is made from it. Raises Diverged for weights not finite."""
        run = self.run
        if not is_finite(run.model.state_dict()):
            raise Diverged(
                f'epoch {run.epoch}, step {run.steps}: the weights are no longer finite; earlier checkpoints are kept; '
                'try a lower --lr with another --out'
            )
        on_main_process(save_last, self.folder, run.state())
        if run.steps == 0:
            on_main_process(write_epoch, run)
        self.mark_saved()

    def save_and_stop(self, stopped):
        """Write last.pt if there is something new; returns the Stopped that says how to continue."""
        if (self.run.epoch, self.run.steps) != self.saved_position:
            self.save()
        epoch, steps = self.saved_position
        if (epoch, steps) == (1, 0):
            return stopped
        where = f'in epoch {epoch}, after {steps} steps of it; {self.folder}/last.pt is written'
        if epoch > self.run.config.epochs:
            where = 'in the test'
        return Stopped(stopped.number, f'stopped {where}; continue with the same command and --resume')


def write_epoch(run):
    """Write the files made from the history; again on resume, as a kill may have left them older than last.pt."""
    folder = Path(run.config.out)
    save_checkpoint(folder / 'best.pt', run.best_model)
    report.write_csv(run.history, folder / 'log.csv')
    report.draw_curves(run.history, PRINTED, folder / 'curves.png')


def train(network, weighting, config):
    """Train `network` with `weighting`, test the best epoch once; returns the content of metrics.json."""
    out = Path(config.out)
    with process_group(config.device), StopRequest() as stop, ExitStack() as lock, worker_errors():
        on_main_process(lock.enter_context, lock_folder(out))
        keep_freed_memory()
        seed_everything(config.seed)
        run = start_run(network, weighting, config)
        checkpoints = Checkpoints(run, stop)
        # With several ranks, signals are checked only in `before_step`, so that all stop before the same step.
        check = stop.check if get_world_size() == 1 else lambda: None
        try:
            while run.epoch <= config.epochs:
                losses, seconds = train_one_epoch(run, checkpoints.before_step), run.seconds()
                row = run.end_epoch(losses, seconds, validate(run, check))
                checkpoints.save()
                print_once(report.epoch_line(row, config.epochs))
            model, options = load_model(out / 'best.pt', run.device), {'workers': config.workers, 'before_batch': check}
            temperature = calibrate(model, run.splits['val'], run.device, **options)
            if temperature:
                on_main_process(save_checkpoint, out / 'best.pt', model_content(model, *run.model_info))
                model = load_model(out / 'best.pt', run.device)  # as it was rounded
                print_once(f'temperature {temperature:.3f} of the class logits, fitted on validation')
            found = run_test(model, run.splits, run.device, **options)
        except Stopped as stopped:
            raise checkpoints.save_and_stop(stopped) from None
        metrics = on_main_process(report_test, run, temperature, *found)
        if stop.number:
            raise Stopped(stop.number, f'stopped after the run in {out} had finished')
        return metrics


def start_run(network, weighting, config):
    """A new Run, or the one that --resume continues; prints its settings."""
    checkpoint = on_main_process(find_checkpoint, Path(config.out), config.resume)
    run = Run(network, weighting, config, read_weights=not checkpoint)
    if checkpoint:
        run.restore(checkpoint)
        print_once(f'resuming from {checkpoint}, epoch {run.epoch}, step {run.steps} of {run.epoch_steps}')
        if run.history:
            on_main_process(write_epoch, run)
    print_once(', '.join(f'{name} {value}' for name, value in run.settings.items()))
    return run


def report_test(run, temperature, test, pooled, scores):
    """Print what `run_test` found, write test_scores.csv and metrics.json; returns the content of the latter."""
    config, best, folder = run.config, run.best, Path(run.config.out)
    class_names = run.splits['train'].dataset.split.class_names
    names, classes = image_names(run.splits['test'])
    chosen = ', '.join(selection_metrics(best))
    chosen = f'best mean of validation {chosen}' if chosen else 'the last, without validation labels'
    report.print_test(f'Test, epoch {best["epoch"]} of {config.epochs} ({chosen})', test | pooled, PRINTED)
    columns = {name: scores[name] for name in METRICS}
    report.write_scores(columns, names, classes, folder / 'test_scores.csv')
    metrics = {
        'test': test,
        'test_pooled': pooled,
        'most_confused': most_confused(scores, class_names),
        'worst_masks': report.lowest(columns['dice'], names),
        'validation': report.entries(best, 'val_'),
        'best_epoch': best['epoch'],
        'temperature': temperature,
        'training_seconds': sum(row['total_seconds'] for row in run.history),
        'config': run.settings | {'workers': config.workers},
        'data': {split: count_known(subset) for split, subset in run.splits.items()},
        'parameters': sum(p.numel() for p in run.model.parameters()),
        'learned_weighting': {name: p.item() for name, p in run.weighting.named_parameters()},
    }
    metrics = report.write_metrics(metrics, folder / 'metrics.json')
    print(f'written to {folder}', flush=True)
    return metrics
