"""How a script starts and ends: one-line errors, signals and argparse types. Imports no torch."""

import argparse
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

# What asks a script to stop. The terminal sends SIGHUP when its window is closed.
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
ECHO = 0.5  # seconds: one Ctrl-C can come twice, from the terminal and from torchrun; within this time it counts once


class InputError(Exception):
    """Ends the script with its message, one line, such as of a file or an option that cannot be used."""


class Stopped(KeyboardInterrupt):
    """A signal asked the script to stop; the exit status is 128 + `number`, as in the shell."""

    def __init__(self, number, message='stopped'):
        super().__init__(message)
        self.number, self.status = number, 128 + number


def run_script(main):
    """Call `main()`. InputError, OSError and MemoryError end the script with one line on standard error
    and exit status 1; a signal ends it with 128 + its number."""

    def stop_at_once(number, frame):
        raise Stopped(number)

    set_stop_handler(stop_at_once)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # file names need not be text
    try:
        main()
    except (InputError, OSError, MemoryError, KeyboardInterrupt) as error:
        clear_frames(error)
        print(one_line(describe(error))[:2000], file=sys.stderr)
        sys.exit(getattr(error, 'status', 130) if isinstance(error, KeyboardInterrupt) else 1)


def clear_frames(error):
    """Let go of what the frames of an error, and of those behind it, hold.

    It may be a DataLoader, for whose workers, which ignore signals, Python would wait for ever.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def describe(error):
    """The line that a script ends with."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or 'stopped'
    if isinstance(error, InputError):
        # An error of a DataLoader's worker arrives with the worker's traceback before it.
        return f'error: {str(error).strip().rpartition("InputError: ")[2]}'
    if isinstance(error, MemoryError):
        return 'error: there is not enough memory'
    return f'error: {f"{error.filename}: " if error.filename else ""}{reason(error)}'


# ---- signals


def set_stop_handler(handler):
    """Let `handler` handle those of STOP_SIGNALS that are not ignored (nohup); returns {signal: old handler}."""
    if threading.current_thread() is not threading.main_thread():  # Python calls handlers nowhere else
        return {}
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers}


class StopRequest:
    """Within its `with` block, the first signal only sets a flag, so that a step or a write is finished first.

    Call `check` where the script may stop; the end of the block checks, too. A second signal ends the process at once.
    """

    def __init__(self):
        self.number = 0  # of the signal, 0 if there was none

    def __enter__(self):
        self.handlers = set_stop_handler(self._set)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _set(self, number, frame):
        if self.number:
            return
        self.number = number
        time.sleep(ECHO)
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)  # of the system, which also ends a process that hangs in a library

    def check(self):
        """Raises Stopped if a signal has come."""
        if self.number:
            raise Stopped(self.number)


@contextmanager
def signals_blocked():
    """Block STOP_SIGNALS, also in processes that are started meanwhile, until those call `ignore_signals`."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals():
    """For a child process: its parent decides when it stops."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


# ---- text of one line


def reason(error):
    """The exception's message as one line of at most 200 characters."""
    text = getattr(error, 'strerror', None) or str(error)
    system = re.search("error message = '([^']*)'", text)  # the system's, in the middle of HDF5's
    return one_line(system[1] if system else text)[:200] or type(error).__name__


def one_line(text):
    """`text` with white space as single blanks and unprintable characters as question marks."""
    return ''.join(each if each.isprintable() else '?' for each in ' '.join(text.split()))


def are_names(values):
    """Whether `values` is a list of printable names of 1 to 100 characters, and not empty."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable() for name in values)
    )


# ---- argparse types


def whole_number(minimum):
    """An argparse type: a whole number from `minimum` to 2**32 - 1."""

    def parse(text):
        if not text.lstrip('+-').isdecimal() or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {minimum} to {2**32 - 1}")
        return int(text)

    return parse


def positive_number(text):
    """An argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def file_to_write(text):
    """An argparse type: a path where a file can be written, so that the script fails before it trains."""
    folder = next(parent for parent in Path(text).absolute().parents if parent.exists())
    other = Path(text).exists() and not Path(text).is_file()  # a folder, a device
    if not text or other or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{text}' is not a file that can be written")
    return text


def folder_to_write(text):
    """An argparse type: the path of a folder, which need not exist."""
    if os.path.lexists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder")
    return text
