"""A function in a process of its own, for files from elsewhere that can crash or hang the library that reads them."""

import ctypes
import multiprocessing
import re
import signal
import sys
from pathlib import Path

from support.cli import InputError, ignore_signals, signals_blocked


def in_own_process(seconds, function, path, *arguments):
    """`function(path, *arguments)`, on Linux in a process of its own with limited CPU time and memory.

    A damaged or hostile file can crash HDF5, keep it busy for ever or take all memory. Raises InputError after
    a crash, `seconds` of CPU time, or 2 GiB more memory than the parent has; raises what the function raises.
    """
    if sys.platform != 'linux':  # elsewhere a new process imports everything again, which takes seconds
        return function(path, *arguments)
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child_main, args=(sender, seconds, function, path, arguments))
    try:
        with signals_blocked():
            process.start()
        sender.close()
        result = receiver.recv()
    except EOFError:
        process.join()
        how = 'took too long' if process.exitcode == -signal.SIGXCPU else f'ended with {process.exitcode}'
        raise InputError(f'{path}: reading it {how}, so it is damaged; it is left as it was; make it again') from None
    finally:
        if process.pid:
            process.kill()
            process.join()
    if isinstance(result, Exception):
        raise result
    return result


def child_main(sender, seconds, function, path, arguments):
    """What the process does: sends the function's value, or the error it raised."""
    import resource  # not on Windows

    ignore_signals()  # the parent ends it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    memory = 1024 * int(re.search(r'VmData:\s+(\d+)', Path('/proc/self/status').read_text())[1])  # the parent's
    for kind, limit in (
        (resource.RLIMIT_DATA, memory + (2 << 30)),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        sender.send(function(path, *arguments))
    except (InputError, OSError) as error:
        sender.send(error)
