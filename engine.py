"""The one way to train and evaluate: data, loop, metrics, checkpoints and the files of a run.

The training scripts say which network and which weighting of the tasks' losses; the rest is here:

    args = engine.training_parser(__doc__, out='runs/mtl').parse_args()
    engine.train(MTLNet, WeightedLoss.equal(MTLNet.tasks), args)

A run writes to its folder log.csv, curves.png, last.pt (to go on from), best.pt (the weights with the
best validation Dice) and, at the end, metrics.json with the test figures of best.pt.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import pickle
import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import models
import utils
from data_rechunk import InputError, reason, replacing, whole_number
from dataloader_mtl import MTLDataset, collate, training_transform

MODEL_FORMAT = 'segmentation-mtl model 1'
TRAINING_FORMAT = 'segmentation-mtl training 1'

JITTER = 0.3  # of colour in training
MASK_REPEATS = 3  # times that a photograph with a mask comes in an epoch where masks are rare


class Task(NamedTuple):
    field: str  # of models.Outputs: the prediction
    position: int  # of the target in a sample of MTLDataset
    loss: Callable  # (prediction, target) -> scalar
    known: Callable  # target -> bool (N,), which samples have the label


class Metric(NamedTuple):
    printed: str  # the original's name where it has one
    task: str
    values: Callable  # (prediction, target, reduction) -> the value of each sample with the label


TASKS = {
    'mask': Task('mask', 3, utils.MaskLoss(), utils.mask_known),
    'class': Task('label', 2, utils.ClassLoss(), utils.label_known),
    'box': Task('bbox', 1, utils.BoxLoss(), utils.box_known),
}

METRICS = {
    'dice': Metric('Dice Score - Segmentation', 'mask', utils.dice_score),
    'mask_iou': Metric('IoU - Segmentation', 'mask', utils.mask_iou),
    'accuracy': Metric('Accuracy - Classification', 'class', utils.accuracy),
    'box_iou': Metric('IoU - Bounding Box Regression', 'box', utils.iou_metric),
}


# ---- options


def training_parser(description, out):
    """The options that all training scripts share; the defaults are the recipe of the README."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--data', default='datasets/data_new', metavar='DIR',
        help='prepared and rechunked splits (default: %(default)s)')
    add('--epochs', type=whole_number(1), default=30, help='passes over the data (default: %(default)s)')
    add('--batch-size', type=whole_number(1), default=16, help='default: %(default)s')
    add('--lr', type=learning_rate, default=3e-3, help='highest learning rate (default: %(default)s)')
    add('--seed', type=whole_number(0), default=0, help='of weights, order and augmentation (default: %(default)s)')
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='default: %(default)s')
    add('--workers', type=whole_number(0), default=1, help='loading processes (default: %(default)s)')
    add('--out', default=out, metavar='DIR', help=f"the run's folder (default: {out or 'named after the experiment'})")
    add('--resume', action='store_true', help='go on from last.pt in --out')
    add('--limit-batches', type=whole_number(1), metavar='N',
        help='take N times the batch size of each split only, for a quick trial')
    return parser


def learning_rate(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def file_to_write(text):
    """An argparse type, so that a name that cannot be written stops the script before it trains."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; expected the name of a file")
    return text


def choose_device(name):
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    elif name == 'cuda' and not torch.cuda.is_available():
        raise InputError('--device cuda: torch finds no CUDA device here; use --device cpu')
    return torch.device(name, torch.cuda.current_device()) if name == 'cuda' else torch.device(name)


def has_fast_bfloat16(device):
    """Whether the processor computes in bfloat16; one that only emulates it is slower than float32."""
    if device.type == 'cpu':
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors instead of returning it to the system.

    glibc maps every large tensor anew, and its pages are zeroed at the first touch, in each step. Kept,
    training is about 10 % faster on a CPU. Other C libraries have no such setting.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a single allocation
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back


# ---- several processes: torchrun --nproc-per-node N train_mtl.py


@contextmanager
def process_group(device_name):
    """Join the other processes that torchrun started, if it did and this one has not yet."""
    if 'RANK' not in os.environ or dist.is_initialized():
        yield
        return
    cuda = device_name != 'cpu' and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    else:  # torchrun asks for a single thread, however many cores there are
        torch.set_num_threads(max(1, available_cores() // int(os.environ['LOCAL_WORLD_SIZE'])))
    dist.init_process_group('nccl' if cuda else 'gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def rank_and_size():
    """Which process this is, from 0, and of how many, as torchrun says it."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def is_first_process():
    """Whether this process is the one that prints and writes."""
    return rank_and_size()[0] == 0


def say(line):
    """Print a line once, however many processes there are."""
    if is_first_process():
        print(line, flush=True)


def gathered(value):
    """The `value` of every process, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


# ---- data


def load_split(args, split, tasks=None):
    """The dataset of a split and the Subset of it that has a label for at least one of `tasks`."""
    dataset = MTLDataset(split, root=args.data)
    height, width = dataset.image_size
    if min(height, width) < 64 or height % 16 or width % 16:
        raise InputError(f'{dataset.folder}: images of {width} x {height} pixels; the networks take '
                         'multiples of 16 from 64 up')
    indices = dataset.with_labels(tasks) if tasks else list(range(len(dataset)))
    if not indices:
        raise InputError(f'{dataset.folder}: no sample has a label for {" or ".join(tasks)}')
    if args.limit_batches:
        wanted = min(len(indices), args.limit_batches * args.batch_size)
        indices = [indices[i * len(indices) // wanted] for i in range(wanted)]
    return dataset, Subset(dataset, indices)


def to_device(batch, device):
    image, *targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    return image.contiguous(memory_format=torch.channels_last), *targets


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def training_positions(part):
    """The positions in the Subset `part` of an epoch's samples, (M,) int64.

    Each sample once; those with a mask MASK_REPEATS times where they are rarer than one in that many,
    or most of the time would go to photographs that the decoder learns nothing from.
    """
    positions = torch.arange(len(part))
    has_mask = torch.from_numpy(part.dataset.labelled['mask'][part.indices])
    if 0 < MASK_REPEATS * has_mask.sum() < len(part):
        positions = torch.cat([positions, positions[has_mask].repeat(MASK_REPEATS - 1)])
    return positions


def batches_of(order, batch_size):
    """This process's shares of the batches of `order`, which is the same in every process.

    Batches have at most `batch_size` samples over all processes, and their sizes differ by one at
    most. Each element of `order` is in one share of one batch.
    """
    rank, size = rank_and_size()
    batches = torch.as_tensor(order).tensor_split(math.ceil(len(order) / batch_size))
    return [batch[rank::size].tolist() for batch in batches]


# ---- one epoch


def forward(model, batch):
    """The Outputs for a batch, and the batch, both with the masks of those that have one alone."""
    image, bbox, label, mask = batch
    has_mask = utils.mask_known(mask)
    return model(image, decode=has_mask), (image, bbox, label, mask[has_mask])


def task_losses(outputs, batch):
    """{task: (loss, number of labelled samples)} for the network's tasks that this batch has."""
    losses = {}
    for name, task in TASKS.items():
        prediction, target = getattr(outputs, task.field), batch[task.position]
        count = int(task.known(target).sum())
        if prediction is not None and count:
            losses[name] = task.loss(prediction, target), count
    return losses


class Objective(nn.Module):
    """A network and its weighting: a batch -> (total loss, losses of `task_losses`).

    One module, so that several processes average the gradients of both. Each has its share of a batch;
    the average of their totals is the total of the batch.
    """

    def __init__(self, model, weighting, bfloat16):
        super().__init__()
        self.model, self.weighting, self.bfloat16 = model, weighting, bfloat16

    def forward(self, batch):
        device = batch[0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs, batch = forward(self.model, batch)
        losses = task_losses(outputs, batch)
        counts = torch.tensor([losses[task][1] if task in losses else 0 for task in TASKS], device=device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        _, processes = rank_and_size()
        scaled = {}
        for task, total in zip(TASKS, counts.tolist()):
            if task in losses:
                loss, count = losses[task]
                scaled[task] = loss * (count * processes / total)
            elif total:  # only in another process's share
                scaled[task] = self.nothing()
        return (self.weighting(scaled) if scaled else self.nothing()), losses

    def nothing(self):
        """A zero that has a gradient: a crop can take the only label of a small batch."""
        return sum(0 * parameter.sum() for parameter in self.model.parameters())


class Means:
    """The mean of each task's loss over the samples that have its label, however they are batched."""

    def __init__(self):
        self.sums, self.counts = Counter(), Counter()

    def add(self, losses):
        for task, (loss, count) in losses.items():
            self.sums[task] += loss.item() * count
            self.counts[task] += count

    def result(self):
        """{'loss_<task>': mean} over all processes."""
        parts = gathered((self.sums, self.counts))
        sums, counts = ({task: sum(part[i][task] for part in parts) for task in TASKS} for i in (0, 1))
        return {f'loss_{task}': sums[task] / counts[task] for task in TASKS if counts[task]}


def train_one_epoch(run, loader, description):
    """One pass over `loader`; returns {'loss_<task>': mean over the samples that have the label}."""
    run.model.train()
    means, seen = Means(), 0
    total_samples = sum(map(len, loader.batch_sampler))
    disable = None if is_first_process() else True  # None: a bar on a terminal, none in a log
    with tqdm(total=total_samples, desc=description, unit='img', leave=False, disable=disable) as bar:
        for batch in loader:
            total, losses = run.objective(to_device(batch, run.device))
            require_finite(total, losses)
            run.optimizer.zero_grad()
            total.backward()
            run.optimizer.step()
            run.schedule.step()
            run.average.update_parameters(run.model)
            means.add(losses)
            seen += len(batch[0])
            bar.set_postfix(loss=f'{total.item():.3f}', refresh=False)
            bar.update(len(batch[0]))
    assert seen == total_samples, 'the loader must give each sample once'
    return means.result()


def require_finite(total, losses):
    if not total.isfinite():
        shown = ', '.join(f'{task} {loss.item():.3g}' for task, (loss, _) in losses.items())
        raise InputError(f'the loss is {total.item()} ({shown}); training stopped and what was saved '
                         'before is kept; try a lower --lr')


@torch.inference_mode()
def evaluate(model, dataset, device, batch_size=32, workers=0, bfloat16=False):
    """The figures of `model` on `dataset`, each a mean over the samples that have the label.

    Computed in evaluation mode; the model's mode is restored. Several processes share the samples and
    all return the figures over all of them. Returns a dict of float with the keys of METRICS and
    'loss_<task>', without those of tasks that the network does not have or for which no sample has a
    label.
    """
    was_training = model.training
    model.eval()
    values, means, seen = {name: [] for name in METRICS}, Means(), 0
    batches = filter(None, batches_of(range(len(dataset)), batch_size))
    for batch in DataLoader(dataset, batch_sampler=list(batches), num_workers=workers, collate_fn=collate):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            outputs, batch = forward(model, to_device(batch, device))
        for name, metric in METRICS.items():
            task = TASKS[metric.task]
            prediction = getattr(outputs, task.field)
            if prediction is not None:
                values[name] += metric.values(prediction, batch[task.position], reduction='none').tolist()
        means.add(task_losses(outputs, batch))
        seen += len(batch[0])
    model.train(was_training)
    assert sum(gathered(seen)) == len(dataset), 'the loader must give each sample once'
    # An exact sum, which does not depend on who computed which sample.
    figures = {name: [value for part in gathered(own) for value in part] for name, own in values.items()}
    return {name: math.fsum(each) / len(each) for name, each in figures.items() if each} | means.result()


def report(title, figures):
    print(title)
    for name, metric in METRICS.items():
        if name in figures:
            print(f'  {metric.printed}: {figures[name]:.4f}')


# ---- checkpoints


def save(content, path):
    with replacing(path) as part:
        torch.save(content, part)


def load_checkpoint(path, expected, device='cpu'):
    """Read a checkpoint of the `expected` format; raises InputError for any other file."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f'{path}: no such file; the training scripts make it') from None
    except pickle.UnpicklingError:  # its message is about torch.load's options
        raise InputError(f'{path}: not a sound checkpoint (not one of plain weights); the training '
                         'scripts write such files') from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(f'{path}: not a sound checkpoint ({reason(error)[:100]})') from None
    found = content.get('format') if isinstance(content, dict) else None
    if found != expected:
        what = f"a '{found}' file" if found else 'another kind of PyTorch file'
        raise InputError(f"{path}: {what}; expected '{expected}', which the training scripts write")
    return content


def network_arguments(network, dataset):
    classes = {'n_classes': len(dataset.class_names)} if 'class' in network.tasks else {}
    return {'c_in': 3, 'c_out_seg': 1, **classes}


def model_content(network, model, dataset):
    """What best.pt and mtl_model.pt hold: all that rebuilds the model for prediction."""
    return {
        'format': MODEL_FORMAT,
        'network': network.__name__,
        'arguments': network_arguments(network, dataset),
        'class_names': dataset.class_names,
        'image_size': list(dataset.image_size),
        'weights': model.state_dict(),
    }


def load_model(path='mtl_model.pt', device='cpu'):
    """The trained network of a model file (best.pt, mtl_model.pt), in evaluation mode.

    It carries `class_names` (list of str) and `image_size` (height, width) as attributes. Raises
    InputError for a file that is missing, damaged or of another kind.
    """
    content = load_checkpoint(path, MODEL_FORMAT)
    try:
        model = getattr(models, content['network'])(**content['arguments'])
        model.load_state_dict(content['weights'])
        model.class_names = content['class_names']
        model.image_size = tuple(content['image_size'])
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f'{path}: does not fit the networks of models.py '
                         f'({reason(error)[:100]}); train it again') from None
    return model.to(device).eval()


# ---- a run


class Run:
    """Everything that training changes; `state` and `restore` are what last.pt holds."""

    PARTS = ('model', 'weighting', 'optimizer', 'schedule', 'average')

    def __init__(self, network, weighting, dataset, total_steps, args):
        self.device = choose_device(args.device)
        self.bfloat16 = has_fast_bfloat16(self.device)
        model = network(**network_arguments(network, dataset))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.weighting = weighting.to(self.device)
        self.objective = Objective(self.model, self.weighting, self.bfloat16)
        if dist.is_initialized():
            # A batch without masks leaves the decoder without gradients.
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1] + list(weighting.parameters())
        self.optimizer = torch.optim.AdamW(
            [{'params': matrices, 'weight_decay': 0.05}, {'params': others, 'weight_decay': 0}], args.lr,
            fused=True,
        )
        # Warm-up and annealing in one cycle (Smith and Topin 2018).
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.lr, total_steps=max(6, total_steps), pct_start=0.2  # it fails with 5
        )
        # The moving average of the weights over about a twentieth of the run is what is evaluated.
        decay = max(0, min(0.999, 1 - 20 / total_steps))
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(decay), use_buffers=True)
        self.history, self.best = [], None  # a dict for each epoch; the best of them

    def state(self, config):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {'format': TRAINING_FORMAT, 'config': config, 'history': self.history,
                'best': self.best, **parts}

    def restore(self, path, config):
        content = load_checkpoint(path, TRAINING_FORMAT, self.device)
        old = content['config']
        changed = [f'{key} was {old.get(key)} and is {value}' for key, value in config.items()
                   if old.get(key) != value]
        if changed:
            raise InputError(f'{path}: another configuration, {", ".join(changed)}; use the same '
                             'options, or another --out')
        for name in self.PARTS:
            getattr(self, name).load_state_dict(content[name])
        self.history, self.best = content['history'], content['best']


def moving_average(decay):
    """For AveragedModel: an exponential moving average that does not hold on to its start.

    The decay is at most (1 + n) / (10 + n) after n updates, an average over about the last ninth of
    them, or the random weights of the start would stay in it for a long time.
    """
    def update(averaged, current, count):
        get_ema_multi_avg_fn(min(decay, float((1 + count) / (10 + count))))(averaged, current, count)
    return update


def train(network, weighting, args, after_epoch=None):
    """Train `network` with `weighting`, test its best epoch once; returns metrics.json's content.

    `after_epoch(row, model)`, if given, is called with each new row of log.csv and the averaged model.
    """
    with process_group(args.device):
        return train_in_group(network, weighting, args, after_epoch)


def train_in_group(network, weighting, args, after_epoch):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    seed_everything(args.seed)
    train_set, train_part = load_split(args, 'train', network.tasks)
    (val_set, val_part), (test_set, test_part) = (
        load_split(args, split, network.tasks) for split in ('val', 'test')
    )
    belong_together(train_set, val_set, test_set)
    train_set.jitter = JITTER
    positions = training_positions(train_part)
    steps = math.ceil(len(positions) / args.batch_size)
    rank, processes = rank_and_size()
    if len(positions) // steps < processes:
        raise InputError(f'batches of {len(positions) // steps} photographs cannot be shared by '
                         f'{processes} processes; start fewer, or give a larger --batch-size')
    run = Run(network, weighting, train_set, steps * args.epochs, args)
    config = {
        'network': network.__name__,
        'weighting': type(weighting).__name__,
        'weights': {task: round(weight, 4) for task, weight in getattr(weighting, 'weights', {}).items()},
        'precision': 'bfloat16' if run.bfloat16 else 'float32',
        'device': run.device.type,
        'processes': processes,
        'train_samples': len(train_part),
        'preparation': train_set.preparation,
        **{name: getattr(args, name)
           for name in ('data', 'epochs', 'batch_size', 'lr', 'seed', 'workers', 'limit_batches')},
    }
    if args.resume:
        run.restore(out / 'last.pt', config)
    say(', '.join(f'{name} {value}' for name, value in config.items()))

    for epoch in range(len(run.history) + 1, args.epochs + 1):
        # Seeded anew for each epoch, so that a resumed run draws what the uninterrupted one drew.
        seed = args.seed * 100_003 + epoch
        seed_everything(seed * processes + rank)
        train_set.transform = training_transform(*training_size(epoch, args.epochs, train_set.image_size))
        order = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))]
        loader = DataLoader(train_part, batch_sampler=batches_of(order, args.batch_size),
                            num_workers=args.workers, pin_memory=run.device.type == 'cuda',
                            collate_fn=collate)
        start = time.perf_counter()
        losses = train_one_epoch(run, loader, f'epoch {epoch}/{args.epochs}')
        seconds = time.perf_counter() - start
        if dist.is_initialized():  # each process has batch statistics of its own; the first's are saved
            for buffer in run.average.buffers():
                dist.broadcast(buffer, 0)
        figures = evaluate(run.average.module, val_part, run.device, workers=args.workers,
                           bfloat16=run.bfloat16)
        row = {
            'epoch': epoch,
            'lr': run.schedule.get_last_lr()[0],
            **{f'train_{name}': value for name, value in losses.items()},
            **{f'val_{name}': value for name, value in figures.items()},
            'train_seconds': seconds,
            'images_per_second': len(positions) / seconds,
            'total_seconds': time.perf_counter() - start,
        }
        run.history.append(row)
        # Where no validation photograph has a mask, the last epoch is the best.
        is_best = run.best is None or not row.get('val_dice', math.nan) <= run.best.get('val_dice', math.nan)
        if is_best:
            run.best = row
        if is_first_process():
            if is_best:
                save(model_content(network, run.average.module, train_set), out / 'best.pt')
            save(run.state(config), out / 'last.pt')
            write_log(run.history, out / 'log.csv')
            draw_curves(run.history, out / 'curves.png')
        say(epoch_line(row, args.epochs))
        if after_epoch:
            after_epoch(row, run.average.module)

    gathered(None)  # the others wait here until best.pt is written
    model = load_model(out / 'best.pt', run.device)
    test = evaluate(model, test_part, run.device, workers=args.workers)
    metrics = {
        'test': test,
        'validation': {name.removeprefix('val_'): value for name, value in run.best.items()
                       if name.startswith('val_')},
        'best_epoch': run.best['epoch'],
        'training_seconds': sum(row['total_seconds'] for row in run.history),
        'config': config,
        'data': {part.dataset.folder.name: count_labels(part)
                 for part in (train_part, val_part, test_part)},
        'parameters': sum(p.numel() for p in model.parameters()),
        'learned_weighting': {name: p.item() for name, p in run.weighting.named_parameters()},
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'torchvision': torchvision.__version__, 'h5py': h5py.__version__,
                     'numpy': np.__version__},
        'machine': {'processor': platform.machine(), 'threads': torch.get_num_threads()},
    }
    if is_first_process():
        chosen = 'best validation Dice' if 'val_dice' in run.best else 'the last, without validation masks'
        report(f'Test, epoch {run.best["epoch"]} of {args.epochs} ({chosen})', test)
        with replacing(out / 'metrics.json') as part:
            part.write_text(json.dumps(metrics, indent=2) + '\n')
        print(f'written to {out}')
    return metrics


def training_size(epoch, epochs, image_size):
    """(height, width) to train at: half of the image's size for 65 % of the epochs, then three quarters
    for 30 %, then the image's.

    A small picture shows the pet well enough to learn most of what there is, at a quarter of the cost
    (progressive resizing: Howard, fast.ai on DAWNBench, 2018). Evaluation is at the image's own size.
    """
    done = (epoch - 1) / epochs
    share = 2 / 4 if done < 0.65 else 3 / 4 if done < 0.95 else 1
    return tuple(max(64, int(side * share) // 16 * 16) for side in image_size)


def belong_together(*datasets):
    """Refuse splits of different classes, sizes or preparations: a photograph could be in two."""
    for what in 'class_names', 'image_size', 'preparation':
        found = [getattr(dataset, what) for dataset in datasets]
        if any(other != found[0] for other in found):
            raise InputError(f'{datasets[0].folder.parent}: the splits do not belong together, their '
                             f'{what} differs; prepare them again')


def count_labels(part):
    """{'photographs', 'mask', 'class', 'box': number of samples of the Subset that have it}."""
    labelled = part.dataset.labelled
    return {'photographs': len(part),
            **{task: int(known[part.indices].sum()) for task, known in labelled.items()}}


def epoch_line(row, epochs):
    shown = ' '.join(f'{name.removeprefix("val_")} {row[name]:.4f}'
                     for name in (f'val_{metric}' for metric in METRICS) if name in row)
    losses = ' '.join(f'{name.removeprefix("train_loss_")} {value:.3f}'
                      for name, value in row.items() if name.startswith('train_loss_'))
    return (f'epoch {row["epoch"]}/{epochs}: training loss {losses}; validation {shown}; '
            f'{row["images_per_second"]:.1f} images/s, {row["total_seconds"]:.0f} s')


def write_log(history, path):
    """A row for each epoch; a figure that an epoch does not have stays empty."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with replacing(path) as part, open(part, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def draw_curves(history, path):
    """The losses in training and the figures in validation against the epochs."""
    from matplotlib.figure import Figure  # a Figure of its own needs no display and no global state

    epochs = [row['epoch'] for row in history]
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for axes, title in (left, 'Loss'), (right, 'Validation'):
        axes.set(title=title, xlabel='epoch')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for number, task in enumerate(TASKS):
        for part, style in ('train', '-'), ('val', '--'):
            values = [row.get(f'{part}_loss_{task}', math.nan) for row in history]
            if not all(map(math.isnan, values)):
                left.plot(epochs, values, style, color=f'C{number}', label=f'{task}, {part}')
    for name, metric in METRICS.items():
        values = [row.get(f'val_{name}', math.nan) for row in history]
        if not all(map(math.isnan, values)):
            right.plot(epochs, values, label=metric.printed)
    right.set_ylim(0, 1)
    left.legend()
    right.legend()
    with replacing(path) as part:
        figure.savefig(part, format='png', dpi=120)
