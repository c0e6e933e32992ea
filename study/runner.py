"""Trains what is missing of the study, some runs side by side, each in a process of its own."""

import math
import multiprocessing
import signal
import statistics
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial

import torch

import engine
from study.arms import ARMS, PARTS, RunKey, train_run
from study.results import add_result, read_runs, search_rates, write_result
from support.cli import STOP_SIGNALS, StopRequest, run_script


def missing_runs(runs, arms, folds):
    """The RunKeys of `arms` that are not among `runs`, in order; those whose rate is not chosen yet have None."""
    keys = []
    for part, count in PARTS:
        wanted = [name for name in part if name in arms]
        chosen = {}
        for kind in dict.fromkeys(ARMS[name].rate_of for name in wanted):
            rates, chosen[kind] = search_rates(runs, kind)
            keys += [RunKey(kind, 0, rate) for rate in rates]
        for fold in folds:
            others = [name for name in wanted if fold or name not in chosen]
            keys += [RunKey(name, fold, chosen[ARMS[name].rate_of]) for name in others if fold < count]
    return [key for key in dict.fromkeys(keys) if key not in runs.index]


def run_process(key, data, folder, device, steps, threads):
    """Train a run in a process of its own; what it prints goes to log.txt in its folder."""
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:  # from the terminal; the runner asks to stop, once
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'a', buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        run_script(partial(train_and_write, key, data, folder, device, steps))


def train_and_write(key, data, folder, device, steps):
    """Train a run and write its result.csv; a run that diverges has no metrics."""
    try:
        metrics = train_run(key, data, folder, device, steps=steps)
    except engine.Diverged as error:
        print(error)
        metrics = None
    write_result(key, metrics, folder)


def start_run(key, data, folder, device, steps, threads):
    arguments = key, data, folder, device, steps, threads
    process = multiprocessing.get_context('spawn').Process(target=run_process, args=arguments)
    process.start()
    return process


def stop_runs(active):
    """Ask the runs to write their checkpoint and end."""
    for process, _ in active.values():
        process.terminate()
    for process, _ in active.values():
        process.join()


def train_all(args):
    """Train all that is missing, `args.jobs` runs at a time; returns the RunKeys of those that failed.

    After `args.minutes`, the runs write their checkpoints and stop.
    """
    threads = max(1, torch.get_num_threads() // args.jobs)
    missing = missing_runs(read_runs(args.out), args.only, args.folds)
    active, failed, seconds = {}, [], []  # active: {RunKey: (process, when it started)}
    end = time.monotonic() + 60 * (args.minutes or math.inf)
    with StopRequest() as stop, ExitStack() as at_end:
        at_end.callback(stop_runs, active)
        while True:
            stop.check()
            ready = [key for key in missing if key.rate and key not in active and key not in failed]
            for key in ready[: args.jobs - len(active)]:
                process = start_run(key, args.data, folder_of(args.runs, key), args.device, args.steps, threads)
                active[key] = process, time.monotonic()
            if not active or time.monotonic() > end:
                return failed
            time.sleep(1)
            for key in [key for key, (process, _) in active.items() if not process.is_alive()]:
                process, began = active.pop(key)
                folder, spent = folder_of(args.runs, key), time.monotonic() - began
                if process.exitcode:
                    failed.append(key)
                    print(f'{folder}: stopped with status {process.exitcode}; see log.txt there', file=sys.stderr)
                    continue
                add_result(args.out, key, folder)
                for path in folder.rglob('last.pt'):  # so that another --out does not take the run over
                    path.unlink()
                missing = missing_runs(read_runs(args.out), args.only, args.folds)
                seconds.append(spent)
                hours = len(missing) * statistics.fmean(seconds) / args.jobs / 3600
                print(f'{folder.name}: {spent / 60:.1f} min; {len(missing)} runs left, about {hours:.1f} h', flush=True)


def folder_of(root, key):
    return root / f'{key.arm}-fold{key.fold}-{key.rate:g}'
