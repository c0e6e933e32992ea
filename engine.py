"""The one way to train and evaluate: data, loop, metrics, checkpoints and the files of a run.

The training scripts say which network and which weighting of the tasks' losses; the rest is here:

    args = engine.training_parser(__doc__, out='runs/mtl').parse_args()
    engine.train(MTLNet, WeightedLoss.equal(MTLNet.tasks), args)

A run writes to its folder last.pt (all of the run, to go on from) and previous.pt (the one before it);
what is made from last.pt: log.csv, curves.png and best.pt (the model with the best validation Dice); and,
at the end, metrics.json with the test figures of best.pt. On a CPU a run that was interrupted and resumed,
wherever that was, ends with the weights of an uninterrupted one, bit for bit: every random number comes
from a seed made of --seed, the epoch and the step.
"""

import argparse
import copy
import csv
import ctypes
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
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
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import models
import utils
from data_rechunk import (LARGEST_SIDE, STOPPING, InputError, Interrupted, Interruption, alone_in, are_names,
                          leave_locks, must_be_file, naming, networks_take, reason, replacing, signals_blocked,
                          whole_number, write_file)
from dataloader_mtl import MTLDataset, collate, training_transform

MODEL_FORMAT = 'segmentation-mtl model 1'
TRAINING_FORMAT = 'segmentation-mtl training 3'

NETWORKS = {network.__name__: network
            for network in (models.MTLNet, models.UNet, models.AblatedNet, models.AblatedNet2)}

MOVING = ('last_epoch', '_step_count', '_last_lr', '_get_lr_called_within_step', '_is_initial')  # of a schedule

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
    add('--lr', type=positive_number, default=3e-3, help='highest learning rate (default: %(default)s)')
    add('--seed', type=whole_number(0), default=0, help='of weights, order and augmentation (default: %(default)s)')
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='default: %(default)s')
    add('--workers', type=whole_number(0), default=1, help='loading processes (default: %(default)s)')
    add('--out', default=out, metavar='DIR', help=f"the run's folder (default: {out or 'named after the experiment'})")
    add('--resume', nargs='?', const='last', choices=('last', 'auto'),
        help='go on from last.pt in --out; auto: from the newest sound checkpoint there, or start if there is none')
    add('--checkpoint-minutes', type=positive_number, default=10, metavar='MINUTES',
        help='write last.pt this often within an epoch, too (default: %(default)s)')
    add('--limit-batches', type=whole_number(1), metavar='N',
        help='take N times the batch size of each split only, for a quick trial')
    return parser


def positive_number(text):
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


def first_process_does(action):
    """`action()` in the first process alone; its value, or what it raised as an InputError, in all of them."""
    value = error = None
    if is_first_process():
        try:
            value = action()
        except (InputError, OSError) as raised:
            error = raised
    value, message = gathered((value, error and (str(error) or reason(error))))[0]
    if message:
        raise error or InputError(message)
    return value


# ---- data


def load_split(args, split, tasks=None):
    """The dataset of a split and the Subset of it that has a label for at least one of `tasks`."""
    dataset = MTLDataset(split, root=args.data)
    height, width = dataset.image_size
    if not networks_take(height, width):
        raise InputError(f'{dataset.folder}: images of {width} x {height} pixels; the networks take '
                         f'multiples of 16 from 64 to {LARGEST_SIDE}')
    indices = dataset.with_labels(tasks) if tasks else list(range(len(dataset)))
    if not indices and split == 'train':
        raise InputError(f'{dataset.folder}: no sample has a label for {" or ".join(tasks)}')
    if args.limit_batches:
        wanted = min(len(indices), args.limit_batches * args.batch_size)
        indices = [indices[i * len(indices) // wanted] for i in range(wanted)]
    return dataset, Subset(dataset, indices)


def to_device(batch, device):
    image, *targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    return image.contiguous(memory_format=torch.channels_last), *targets


def seed_everything(*key):
    """Seed Python, numpy and torch with what becomes of up to four whole numbers; returns the seed."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


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
    batches = torch.as_tensor(order).tensor_split(max(1, math.ceil(len(order) / batch_size)))
    return [batch[rank::size].tolist() for batch in batches]


class EpochBatches(Dataset):
    """This process's shares of an epoch's batches of the Subset `part`; item i is that of batch i, collated.

    Each is drawn from a seed of its own, so that neither the number of loading processes nor an
    interruption changes what is drawn.
    """

    def __init__(self, part, batches, seed, epoch):
        self.part, self.batches, self.key = part, batches, (seed, epoch)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        self.seed(number, 0)
        return collate(self.part.__getitems__(self.batches[number]))

    def seed(self, number, use):
        """Seed this process for loading (use 0) or training on (use 1) batch `number`."""
        rank, _ = rank_and_size()
        seed_everything(*self.key, number + 1, 2 * rank + use)

    def samples(self, number):
        """The indices in the split's files of batch `number`."""
        return [self.part.indices[position] for position in self.batches[number]]

    def loader(self, start, workers, device):
        """A DataLoader of the batches from `start` on."""
        return DataLoader(self, batch_size=None, sampler=range(start, len(self)), num_workers=workers,
                          worker_init_fn=start_worker, pin_memory=device.type == 'cuda')


def start_worker(_):
    """What stops the training does not stop a loading process, or the step could not be finished."""
    leave_locks()
    if hasattr(signal, 'pthread_sigmask'):
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        # The DataLoader ends its processes itself. Should it not, SIGTERM does so a minute later.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def started(loader):
    """`iter(loader)`, with signals held off from its processes until `start_worker` has dealt with them."""
    with signals_blocked():
        return iter(loader)


def check_together(interruption, due, device):
    """`interruption.check` for all processes at once; also whether `due` is true in any of them."""
    if dist.is_initialized():
        asked = torch.tensor([interruption.number, due], device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        interruption.number, due = asked.tolist()
    interruption.check()
    return bool(due)


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

    def __init__(self, sums=(), counts=()):
        self.sums, self.counts = Counter(sums), Counter(counts)

    def add(self, losses):
        for task, (loss, count) in losses.items():
            self.sums[task] += loss.item() * count
            self.counts[task] += count

    def totals(self):
        """({task: sum}, {task: count}) over all processes."""
        parts = gathered((self.sums, self.counts))
        sums, counts = ({task: sum(part[i][task] for part in parts) for task in TASKS} for i in (0, 1))
        return {task: float(total) for task, total in sums.items()}, counts

    def result(self):
        """{'loss_<task>': mean} over all processes."""
        sums, counts = self.totals()
        return {f'loss_{task}': sums[task] / counts[task] for task in TASKS if counts[task]}


def train_one_epoch(run, loader, description, before_step=lambda: None):
    """The rest of an epoch, one step for each batch of `loader`, a loader of EpochBatches.

    `run.steps` is the number of steps of the epoch that are done. Returns {'loss_<task>': mean over the
    samples that have the label} of the whole epoch.
    """
    run.model.train()
    epoch = loader.dataset
    total_samples, done = (sum(map(len, epoch.batches[:end])) for end in (None, run.steps))
    disable = None if is_first_process() else True  # None: a bar on a terminal, none in a log
    with tqdm(total=total_samples, initial=done, desc=description, unit='img', leave=False, disable=disable) as bar:
        for batch in started(loader):
            before_step()
            epoch.seed(run.steps, 1)
            total, losses = run.objective(to_device(batch, run.device))
            if not all(gathered(bool(total.isfinite()))):
                raise not_finite(description, run.steps, epoch, total, losses)
            run.optimizer.zero_grad()
            total.backward()
            run.optimizer.step()
            run.schedule.step()
            run.average.update_parameters(run.model)
            run.means.add(losses)
            run.steps += 1
            done += len(batch[0])
            bar.set_postfix(loss=f'{total.item():.3f}', refresh=False)
            bar.update(len(batch[0]))
    assert done == total_samples, 'the loader must give each sample once'
    return run.means.result()


def not_finite(description, step, epoch, total, losses):
    """The InputError for a loss that is not finite."""
    shown = ', '.join(f'{task} {loss.item():.3g}' for task, (loss, _) in losses.items())
    return InputError(
        f'{description}, step {step + 1} of {len(epoch)}: the loss is {total.item()} ({shown}) for the samples '
        f'{" ".join(map(str, sorted(epoch.samples(step))))} of {epoch.part.dataset.folder}; nothing was saved since '
        'it went wrong; try a lower --lr, with --resume or another --out, or look at these samples'
    )


@torch.inference_mode()
def evaluate(model, dataset, device, batch_size=32, workers=0, bfloat16=False, before_batch=lambda: None):
    """The figures of `model` on `dataset`, each a mean over the samples that have the label.

    Computed in evaluation mode; the model's mode is restored. `before_batch` may raise. Several processes
    share the samples and all return the figures over all of them. Returns a dict of float with the keys
    of METRICS and 'loss_<task>', without those of tasks that the network does not have or for which no sample has a
    label.
    """
    was_training = model.training
    model.eval()
    values, means, seen = {name: [] for name in METRICS}, Means(), 0
    batches = filter(None, batches_of(range(len(dataset)), batch_size))
    loader = DataLoader(dataset, batch_sampler=list(batches), num_workers=workers, collate_fn=collate,
                        worker_init_fn=start_worker)
    for batch in started(loader):
        before_batch()
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
    print(title if figures else f'{title}: no sample has a label')
    for name, metric in METRICS.items():
        if name in figures:
            print(f'  {metric.printed}: {figures[name]:.4f}')


# ---- checkpoints


class Damaged(InputError):
    """A checkpoint of which nothing can be told."""


def load_checkpoint(path, expected, device='cpu'):
    """Read a checkpoint of the `expected` format; raises InputError for any other file.

    No code in the file runs, and a single changed bit is noticed.
    """
    must_be_file(path, 'the training scripts make it')
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's remarks on files that are refused below
            content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f'{path}: cannot be read ({reason(error)})') from None
    except Exception as error:  # torch.load lets through whatever damage makes it raise
        said = 'it holds more than plain weights' if 'weights_only' in str(error) else reason(error)
        raise Damaged(f"{path}: not a sound checkpoint ({said}); expected '{expected}', which the training "
                      'scripts write') from None
    found = content.get('format') if isinstance(content, dict) else None
    if not isinstance(found, str) or found != expected:
        what = 'another kind of PyTorch file, such as a state dict'
        if isinstance(found, str):
            what = f'a file of the format {found!r:.50}'
        raise InputError(f"{path}: {what}; expected '{expected}', which the training scripts write")
    return content


def check_archive(path):
    """Raises ValueError for an archive that torch.save did not write or that has changed since.

    It writes a zip file, uncompressed, with a checksum of each member, which torch.load ignores.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError('a compressed archive')
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part '{damaged}' is damaged")


def is_flat(values, nested=True):
    """Whether `values` is a dict of text, numbers, None and, once, such dicts: what has an end when it is shown."""
    return isinstance(values, dict) and all(
        isinstance(value, (str, int, float, type(None))) or nested and is_flat(value, nested=False)
        for value in values.values()
    )


def difference(mine, other, where=''):
    """The first place where two nested values are of different kinds, '' if there is none.

    Kinds are types, the keys of dicts, the lengths of lists, and the shapes and types of tensors.
    """
    if type(mine) is not type(other):
        return f'{where} is {type(other).__name__}'
    if isinstance(mine, torch.Tensor):
        same = (mine.shape, mine.dtype, mine.layout) == (other.shape, other.dtype, other.layout)
        return '' if same else f'{where} is {other.dtype} {tuple(other.shape)}'
    if isinstance(mine, dict):
        if mine.keys() != other.keys():
            return f'{where} has other entries'
        pairs = [(key, mine[key], other[key]) for key in mine]
    elif isinstance(mine, (list, tuple)):
        if len(mine) != len(other):
            return f'{where} has {len(other)} entries'
        pairs = zip(range(len(mine)), mine, other)
    else:
        return ''
    return next(filter(None, (difference(a, b, f'{where} {key}'.strip()) for key, a, b in pairs)), '')


def network_arguments(network, class_names):
    classes = {'n_classes': len(class_names)} if 'class' in network.tasks else {}
    return {'c_in': 3, 'c_out_seg': 1, **classes}


def model_content(network, model, dataset):
    """What best.pt and mtl_model.pt hold, all that rebuilds the model for prediction: a copy."""
    return {
        'format': MODEL_FORMAT,
        'network': network.__name__,
        'arguments': network_arguments(network, dataset.class_names),
        'class_names': dataset.class_names,
        'image_size': list(dataset.image_size),
        'weights': copy.deepcopy(model.state_dict()),
    }


def load_model(path='mtl_model.pt', device='cpu'):
    """The trained network of a model file (best.pt, mtl_model.pt), in evaluation mode.

    It carries `class_names` (list of str) and `image_size` (height, width) as attributes. Raises
    InputError for a file that is missing, damaged or of another kind.
    """
    content = load_checkpoint(path, MODEL_FORMAT)
    try:
        network, names, size = (content[key] for key in ('network', 'class_names', 'image_size'))
        if not isinstance(network, str):
            raise ValueError('its network is no name')
        if not are_names(names):
            raise ValueError('its class names are no list of names that can be printed')
        if not isinstance(size, list) or [type(side) for side in size] != [int, int] or not networks_take(*size):
            raise ValueError('its image size is not one that the networks take')
        arguments = network_arguments(NETWORKS[network], names)
        with torch.device('meta'):  # nothing is allocated but what the file holds
            model = NETWORKS[network](**arguments)
        wrong = (difference(arguments, content['arguments'], 'arguments')
                 or difference(model.state_dict(), content['weights'], 'weights'))
        if wrong or arguments != content['arguments']:
            raise ValueError(wrong or 'other arguments')
        model.load_state_dict(content['weights'], assign=True)
        if not is_finite(content['weights']):
            raise ValueError('some of its weights are not finite')
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f'{path}: does not fit the networks of models.py ({reason(error)}); train it '
                         'again') from None
    model.class_names, model.image_size = names, tuple(size)
    return model.to(device).eval()


def is_finite(state_dict):
    return all(bool(tensor.isfinite().all()) for tensor in state_dict.values())


# ---- a run


class Run:
    """Everything that training changes; `state` and `restore` are what last.pt holds."""

    PARTS = ('model', 'weighting', 'optimizer', 'schedule', 'average')

    def __init__(self, network, weighting, dataset, total_steps, args):
        self.network, self.dataset, self.device = network, dataset, choose_device(args.device)
        self.bfloat16 = has_fast_bfloat16(self.device)
        model = network(**network_arguments(network, dataset.class_names))
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
        self.history, self.best, self.best_model = [], None, None  # a dict for each epoch; the best of them
        # Of the epoch under way: the steps that are done, their losses and the seconds of earlier processes.
        self.steps, self.means, self.seconds = 0, Means(), 0.0
        self.start_clock()

    def start_clock(self):
        self.started = time.perf_counter() - self.seconds

    def clock(self):
        """Seconds that went into the epoch under way, in this process and before."""
        return time.perf_counter() - self.started

    def add(self, row):
        """End the epoch with its row of figures."""
        self.history.append(row)
        self.steps, self.means, self.seconds = 0, Means(), 0.0
        self.start_clock()
        # Where no validation photograph has a mask, the last epoch is the best.
        is_best = self.best is None or not row.get('val_dice', math.nan) <= self.best.get('val_dice', math.nan)
        if is_best:
            self.best, self.best_model = row, self.averaged_model()

    def averaged_model(self):
        return model_content(self.network, self.average.module, self.dataset)

    def position(self):
        """(epoch from 1, steps of it that are done)."""
        return len(self.history) + 1, self.steps

    def state(self, config):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        sums, counts = self.means.totals()
        return {'format': TRAINING_FORMAT, 'config': config, 'history': self.history, 'best': self.best,
                'best_model': self.best_model, 'steps': self.steps, 'sums': sums, 'counts': counts,
                'seconds': self.clock(), **parts}

    def restore(self, content, path, config, epoch_steps):
        """Go on from the `content` of the checkpoint `path`; raises InputError if it is another run's."""
        try:
            old = content['config']
            if not is_flat(old):
                raise ValueError('its configuration is not plain')
            changed = [f'{key} was {old.get(key)} and is {value}' for key, value in config.items()
                       if old.get(key) != value]
            if changed:
                raise InputError(f'{path}: another configuration, {", ".join(changed)}; use the same '
                                 'options, or another --out')
            self.require_state(content, config, epoch_steps)
            for name in self.PARTS:
                getattr(self, name).load_state_dict(content[name])
            weights = [content[name] for name in ('model', 'weighting', 'average')]
            if content['history']:
                weights.append(content['best_model']['weights'])
            if not all(map(is_finite, weights)):
                raise ValueError('some of its weights are not finite')
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(f'{path}: does not fit this training ({reason(error)}); start anew with '
                             'another --out') from None
        self.history, self.best, self.best_model = content['history'], content['best'], content['best_model']
        self.steps, self.seconds = content['steps'], content['seconds']
        self.start_clock()
        if is_first_process():  # it has the sums over all processes
            self.means = Means(content['sums'], content['counts'])

    def require_state(self, content, config, epoch_steps):
        """Raises ValueError if `content` is not what `state` can return in a run of `epoch_steps` steps an epoch."""
        history, steps, done = content['history'], content['steps'], content['schedule']['last_epoch']
        if not isinstance(history, list) or not all(map(is_row, history)):
            raise ValueError('its history is no list of rows of log.csv')
        if content['best'] not in (history or [None]):
            raise ValueError('its best epoch is none of its history')
        if not 0 <= content['seconds'] < math.inf:
            raise ValueError(f'it took {content["seconds"]} seconds')
        parameters = [p.detach() for group in self.optimizer.param_groups for p in group['params']]
        moments = content['optimizer']['state']
        mine = self.state(config) | {'history': history, 'best': content['best'],
                                     'best_model': self.averaged_model() if history else None}
        mine['optimizer']['state'] = {  # those that have had a gradient have moments
            number: {'step': torch.tensor(0.0), 'exp_avg': parameters[number], 'exp_avg_sq': parameters[number]}
            for number in moments if number in range(len(parameters))
        }
        wrong = difference(mine, content)
        if wrong:
            raise ValueError(wrong)
        # The fused optimiser takes a moment for a block of memory that is laid out as its parameter.
        if any(moment.stride() != parameters[number].stride() for number, each in moments.items()
               for name, moment in each.items() if name != 'step'):
            raise ValueError('the layout of its optimizer is another')
        pairs = [('schedule', MOVING, mine['schedule'], content['schedule'])]
        pairs += [('optimizer', ('lr', 'betas'), one, other)
                  for one, other in zip(mine['optimizer']['param_groups'], content['optimizer']['param_groups'])]
        if history:
            pairs.append(('best_model', ('weights',), mine['best_model'], content['best_model']))
        for name, moving, one, other in pairs:
            if any(one[key] != other[key] for key in one if key not in moving):
                raise ValueError(f'its {name} is another')
        if ([row['epoch'] for row in history] != list(range(1, len(history) + 1)) or not 0 <= steps <= epoch_steps
                or done != len(history) * epoch_steps + steps):
            raise ValueError(f'{done} steps are not {len(history)} epochs and {steps} steps')


class Saving:
    """Writes last.pt when it is time, and when a signal asks the run to stop."""

    def __init__(self, run, config, folder, minutes, interruption):
        self.run, self.config, self.folder = run, config, folder
        self.seconds, self.interruption = 60 * minutes, interruption
        self.position, self.time = run.position(), time.monotonic()

    def before_step(self):
        due = time.monotonic() - self.time > self.seconds and self.run.position() != self.position
        if check_together(self.interruption, due, self.run.device):
            self.write()

    def write(self):
        require_finite(self.run)
        state = self.run.state(self.config)
        first_process_does(lambda: save_state(state, self.folder))
        if self.run.steps == 0:
            first_process_does(lambda: write_epoch(self.run, self.folder))
        self.position, self.time = self.run.position(), time.monotonic()

    def interrupted(self, stop):
        """Write what is new; returns the Interrupted that says how to go on."""
        if self.run.position() != self.position:
            self.write()
        epoch, steps = self.position
        if (epoch, steps) == (1, 0):
            return stop
        if epoch > self.config['epochs']:
            return Interrupted(stop.number, 'interrupted in the test; go on with the same command and --resume')
        return Interrupted(stop.number, f'interrupted in epoch {epoch}, after {steps} steps of it; '
                           f'{self.folder}/last.pt is written; go on with the same command and --resume')


def require_finite(run):
    """Raises InputError if the weights are not numbers any more, before they replace any that are."""
    if not is_finite(run.model.state_dict()) or not is_finite(run.average.state_dict()):
        epoch, steps = run.position()
        raise InputError(f'epoch {epoch}, step {steps}: the loss was finite and the weights are not any more; '
                         'what was saved before is kept; try a lower --lr, with --resume or another --out')


def save_state(state, folder):
    """Write last.pt; the one before it stays as previous.pt."""
    last = folder / 'last.pt'
    if last.exists():
        with replacing(folder / 'previous.pt') as part, naming(part):
            part.unlink()
            try:
                os.link(os.path.realpath(last), part)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, part)
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(last) as part, naming(part):
        part.write_bytes(content.getbuffer())
        (folder / 'metrics.json').unlink(missing_ok=True)  # of a finished run, which this one is not


def write_epoch(run, folder):
    """Write what is made from last.pt, and after it; who goes on from one that is newer writes these again."""
    write_file(folder / 'best.pt', lambda file: torch.save(run.best_model, file))
    write_log(run.history, folder / 'log.csv')
    draw_curves(run.history, folder / 'curves.png')


def find_state(folder, resume):
    """The path of the checkpoint to go on from as --resume asks; None to start anew."""
    last, previous = folder / 'last.pt', folder / 'previous.pt'
    if not resume:
        if last.exists() and not (folder / 'metrics.json').exists():
            raise InputError(f'{folder}: holds an unfinished run; --resume goes on with it; to start anew, remove '
                             'its last.pt or give another --out')
        return None
    if resume == 'last':
        return last
    for path in last, previous:
        if os.path.lexists(path):
            try:
                load_checkpoint(path, TRAINING_FORMAT)
                return path
            except Damaged as error:
                say(f'warning: {error}; kept as damaged_{path.name}')
                os.replace(path, folder / f'damaged_{path.name}')
    say(f'{folder}: no sound checkpoint to go on from; starting anew')
    return None


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
    out = Path(args.out)
    with process_group(args.device), Interruption() as interruption, ExitStack() as stack:
        first_process_does(lambda: stack.enter_context(alone_in(out)))
        return train_in_group(network, weighting, args, out, interruption, after_epoch)


def train_in_group(network, weighting, args, out, interruption, after_epoch):
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
        **{name: getattr(args, name) for name in ('data', 'epochs', 'batch_size', 'lr', 'seed', 'limit_batches')},
    }
    path = first_process_does(lambda: find_state(out, args.resume))
    if path is not None:
        run.restore(load_checkpoint(path, TRAINING_FORMAT, run.device), path, config, steps)
        say(f'going on from {path}, epoch {len(run.history) + 1}, step {run.steps} of {steps}')
        if run.history:
            first_process_does(lambda: write_epoch(run, out))
    say(', '.join(f'{name} {value}' for name, value in config.items()))
    saving = Saving(run, config, out, args.checkpoint_minutes, interruption)
    # Several processes look for signals where all of them come by: in training.
    check = interruption.check if processes == 1 else lambda: None
    try:
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            train_set.transform = training_transform(*training_size(epoch, args.epochs, train_set.image_size))
            shuffle = torch.Generator().manual_seed(seed_everything(args.seed, epoch))
            order = positions[torch.randperm(len(positions), generator=shuffle)]
            batches = EpochBatches(train_part, batches_of(order, args.batch_size), args.seed, epoch)
            loader = batches.loader(run.steps, args.workers, run.device)
            run.start_clock()
            losses = train_one_epoch(run, loader, f'epoch {epoch}/{args.epochs}', saving.before_step)
            seconds = run.clock()
            require_finite(run)
            if dist.is_initialized():  # each process has batch statistics of its own; the first's are saved
                for buffer in run.average.buffers():
                    dist.broadcast(buffer, 0)
            figures = evaluate(run.average.module, val_part, run.device, workers=args.workers,
                               bfloat16=run.bfloat16, before_batch=check)
            row = {
                'epoch': epoch,
                'lr': run.schedule.get_last_lr()[0],
                **{f'train_{name}': value for name, value in losses.items()},
                **{f'val_{name}': value for name, value in figures.items()},
                'train_seconds': seconds,
                'images_per_second': len(positions) / seconds,
                'total_seconds': run.clock(),
            }
            run.add(row)
            saving.write()
            say(epoch_line(row, args.epochs))
            if after_epoch:
                after_epoch(row, run.average.module)
        model = load_model(out / 'best.pt', run.device)
        test = evaluate(model, test_part, run.device, workers=args.workers, before_batch=check)
    except Interrupted as stop:
        raise saving.interrupted(stop) from None

    metrics = {
        'test': test,
        'validation': {name.removeprefix('val_'): value for name, value in run.best.items()
                       if name.startswith('val_')},
        'best_epoch': run.best['epoch'],
        'training_seconds': sum(row['total_seconds'] for row in run.history),
        'config': config | {'workers': args.workers},
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
        text = json.dumps(metrics, indent=2) + '\n'
        write_file(out / 'metrics.json', lambda file: file.write(text.encode()))
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


FIGURES = ('epoch', 'lr', 'train_seconds', 'images_per_second', 'total_seconds', *(f'val_{name}' for name in METRICS),
           *(f'{split}_loss_{task}' for split in ('train', 'val') for task in TASKS))


def is_row(row):
    """Whether `row` can be a row of log.csv: named figures that can be drawn and added up."""
    return isinstance(row, dict) and {'epoch', 'total_seconds'} <= row.keys() and all(
        name in FIGURES and type(value) in (int, float) and not 1e100 < abs(value) < math.inf
        for name, value in row.items()
    )


def write_log(history, path):
    """A row for each epoch; a figure that an epoch does not have stays empty."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_file(path, lambda file: file.write(text.getvalue().encode()))


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
    for axes in left, right:
        if axes.lines:
            axes.legend()
    write_file(path, lambda file: figure.savefig(file, format='png', dpi=120))
