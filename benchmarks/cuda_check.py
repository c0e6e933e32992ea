"""Does training work on a GPU, and how fast is it? Run by `make cuda-check`; needs no network and no installation.

    python benchmarks/cuda_check.py --out runs/cuda_check

Without a GPU it says so in one line. With one, it draws 400 pets and

    tests       runs tests/test_cuda.py
    losses      compares the losses of the first steps with those on the CPU, in float32 without TF32
    resume      stops a run in the middle and resumes it, without and with workers. Two runs that are not stopped differ
                in their weights by some noise, or not at all; the resumed one may differ by ten times that
    throughput  images a second of training at 256 x 256, augmented on the GPU (0 workers) or by 1 to 8 workers on the
                CPU, relative to a batch that stays on the GPU
    memory      the peak of the GPU's memory in bfloat16, relative to float32

A part that fails is told and stops no other; the exit status is 1 then. Expect six minutes at most. --out gets
cuda_check.json and cuda_check.txt, which is what is printed.
"""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
import torch
from train_step import Line, make_step, seconds_per_step

import engine
from dataloader_mtl import MTLDataset
from models import MTLNet
from support.checkpoint import TRAINING_FORMAT, load_checkpoint
from support.cli import Stopped, one_line, reason, run_script
from support.device import keep_freed_memory, seed_everything
from support.files import write_file
from utils import WeightedLoss

LOSS_TOLERANCE = 1e-3  # relative
NOISE_FACTOR = 10  # a GPU may add in another order each time, and training makes such differences grow
WORKERS = (0, 1, 2, 4, 8)
SIZE, PETS = 256, 400


class CheckFailed(Exception):
    """A part's answer is not the expected one."""


class Recording(WeightedLoss):
    """A WeightedLoss that keeps the total of each step and asks the run to stop in step `stop_at`, from 1."""

    def __init__(self, weights):
        super().__init__(weights)
        self.totals, self.stop_at = [], None

    def forward(self, losses):
        total = super().forward(losses)
        self.totals.append(total.item())
        if len(self.totals) == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return total


@contextmanager
def exact():
    """Convolutions without TF32, and algorithms that give the same bits each time where there are any."""
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'  # without it, matrix products are not deterministic
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(False)


# ---- the parts: each returns (what to print, what goes into the JSON), or raises


def run_tests(path=common.ROOT / 'tests' / 'test_cuda.py'):
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-m', 'cuda', '-rs', '-q', str(path)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ['no output'])[-1]
    if done.returncode or not re.search(r'\d+ passed', last) or 'skipped' in last:
        raise CheckFailed(f'{last}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}')
    return last, {'pytest': last}


def first_losses(config):
    """The total loss of each step of one epoch."""
    seed_everything(config.seed)
    weighting = Recording.equal(MTLNet.tasks)
    run = engine.Run(MTLNet, weighting, config)
    run.model.class_head.dropout.p = 0  # its random numbers are other ones on a GPU
    engine.train_one_epoch(run)
    return weighting.totals


def compare_losses(data, device, steps=8, tolerance=LOSS_TOLERANCE):
    # The learning rate rises as in a long run. A worker augments on the CPU, so that both see the same images.
    config = engine.Config(data, epochs=100, steps=steps, bfloat16=False, workers=1, sizes=((1, 1 / 2),))
    with exact():
        ours, cpu = (first_losses(replace(config, device=each)) for each in (device, 'cpu'))
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, cpu)]
    text = f'the losses of {steps} steps differ from those on the CPU by {max(differences):.1e} at most'
    if max(differences) > tolerance:
        raise CheckFailed(f'{text}, more than {tolerance:g}: {ours} and {cpu}')
    return text, {'device': ours, 'cpu': cpu, 'largest_difference': max(differences), 'tolerance': tolerance}


def train_to_end(config, stop_at=None):
    """The weights after a run that was stopped in step `stop_at`, if it is given, and resumed."""
    weighting = Recording.equal(MTLNet.tasks)
    weighting.stop_at = stop_at
    with redirect_stdout(io.StringIO()):
        try:
            engine.train(MTLNet, weighting, config)
        except Stopped:
            engine.train(MTLNet, Recording.equal(MTLNet.tasks), replace(config, resume='last'))
    return load_checkpoint(Path(config.out) / 'last.pt', TRAINING_FORMAT)['model']


def largest_difference(one, two):
    """Of two state dicts, relative to the largest value of each tensor."""
    return max(
        ((one[name] - two[name]).abs().max() / two[name].abs().max().clamp(min=1e-12)).item()
        for name in one
        if one[name].is_floating_point()
    )


def check_resume(data, device, out, steps=10, batch_size=32, workers=0):
    """The stop is in the middle of the second of two epochs."""
    config = engine.Config(data, epochs=2, steps=steps, batch_size=batch_size, device=device, workers=workers)
    runs = {'whole': None, 'again': None, 'resumed': steps + steps // 2}
    with exact():
        whole, again, resumed = (
            train_to_end(replace(config, out=str(Path(out) / name)), stop_at) for name, stop_at in runs.items()
        )
    noise, difference = largest_difference(whole, again), largest_difference(whole, resumed)
    text = f'a resumed run differs by {difference:.1e} from a whole one, which differs by {noise:.1e} from another'
    if difference > NOISE_FACTOR * noise:
        raise CheckFailed(text)
    return text, {'resumed': difference, 'repeated': noise}


def stored_size(data):
    return MTLDataset(root=data).split.image_size


def images_per_second(config, warm_up):
    """Of training for an epoch, after `warm_up` steps of it."""
    seed_everything(config.seed)
    run = engine.Run(MTLNet, WeightedLoss.equal(MTLNet.tasks), config)
    times = []
    engine.train_one_epoch(run, lambda: times.append(time.perf_counter()))
    return (run.steps - warm_up) * config.batch_size / (time.perf_counter() - times[warm_up])


def measure_throughput(data, device, workers=WORKERS, steps=150, warm_up=30, seconds=5.0):
    config = engine.Config(data, epochs=1, steps=steps, device=device, sizes=((1, 1),))
    take_step = make_step(Line(MTLNet), stored_size(data), config)
    seconds_per_step(take_step, seconds / 5)  # the first steps plan
    limit = config.batch_size / seconds_per_step(take_step, seconds)
    lines, speeds = [f'  no loading  {limit:8.0f}'], {'no loading': limit}
    for count in workers:
        speeds[count] = speed = images_per_second(replace(config, workers=count), warm_up)
        lines.append(f'{count:4} workers  {speed:8.0f}  {speed / limit:.2f} of it')
    return '\n'.join(['images/s of training', *lines]), {'images_per_second': speeds}


def measure_memory(data, device, steps=3):
    peaks = {}
    for precision in 'float32', 'bfloat16':
        config = engine.Config(data, device=device, bfloat16=precision == 'bfloat16')
        take_step = make_step(Line(MTLNet), stored_size(data), config)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            take_step()
        peaks[precision] = torch.cuda.max_memory_allocated() / 1e6
        del take_step
    float32, bfloat16 = peaks.values()
    text = f'{bfloat16:.0f} MB at the peak in bfloat16, {bfloat16 / float32:.2f} of the {float32:.0f} MB in float32'
    return text, {'peak_mb': peaks, 'batch_size': engine.Config.batch_size}


# ---- the report


def write_text(path, text):
    write_file(path, lambda file: file.write(f'{text}\n'.encode()))


def check(parts, out, title):
    """Run {name: function}, write and print the report; returns the names of those that failed."""
    page, results, failed = [title], {}, []
    print(title, flush=True)
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            text, results[name] = part()
            state = 'ok'
        except Exception as error:
            state, text = 'FAILED', str(error) if isinstance(error, CheckFailed) else traceback.format_exc()
            results[name] = {'error': one_line(reason(error))}
            failed.append(name)
        seconds = time.perf_counter() - start
        results[name] |= {'ok': state == 'ok', 'seconds': seconds}
        page.append(f'\n{name}: {state}, {seconds:.0f} s\n{text}')
        print(page[-1], flush=True)
        # After each part: a machine that is taken away leaves what was measured.
        write_text(out / 'cuda_check.json', json.dumps({'title': title, 'parts': results}, indent=2))
        write_text(out / 'cuda_check.txt', '\n'.join(page))
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out_help = 'where the report goes (default: %(default)s)'
    parser.add_argument('--out', type=Path, default=Path('runs/cuda_check'), metavar='DIR', help=out_help)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print('no CUDA device: nothing to check')
        return
    keep_freed_memory()
    title = f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {os.cpu_count()} cores; {common.machine()}'
    with common.prepared(None, PETS, SIZE) as data:
        parts = {
            'tests': run_tests,
            'losses': partial(compare_losses, data, 'cuda'),
            'resume': partial(check_resume, data, 'cuda', Path(data) / 'runs'),
            'resume with workers': partial(check_resume, data, 'cuda', Path(data) / 'with_workers', workers=2),
            'throughput': partial(measure_throughput, data, 'cuda'),
            'memory': partial(measure_memory, data, 'cuda'),
        }
        failed = check(parts, args.out, title)
    print(f'\nwritten to {args.out}')
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    run_script(main)
