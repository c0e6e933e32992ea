"""How a script ends: errors, signals."""

import os
import signal

import pytest
from conftest import run_in_child

from support.cli import InputError, Stopped, StopRequest, set_stop_handler


def test_undecodable_and_control_characters_are_escaped_in_output(tmp_path):
    def main(_):
        print(b'caf\xe9'.decode(errors='surrogateescape'))
        raise InputError('a\x1b[2J\nb')

    assert run_in_child(main, [], tmp_path / 'log.txt') == 1
    assert sorted((tmp_path / 'log.txt').read_text().splitlines()) == ['caf\\udce9', 'error: a?[2J b']


def test_a_signal_ends_a_script_with_its_exit_status(tmp_path):
    log = tmp_path / 'log.txt'
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        assert run_in_child(lambda _, number=number: signal.raise_signal(number), [], log) == 128 + number
    assert log.read_text() == 3 * 'stopped\n'


def test_a_stop_request_waits_for_the_next_check_or_the_end_of_the_block():
    done = []
    with pytest.raises(Stopped) as stopped:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            done.append('step')
            stop.check()
    assert stopped.value.status == 143 and done == ['step']
    with pytest.raises(Stopped):
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_a_process_that_hangs(tmp_path):
    def hang(_):
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)  # returns when the handler is done
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

    assert run_in_child(hang, [], tmp_path / 'log.txt') == -signal.SIGINT


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup and shells do so for what runs in the background
    set_stop_handler(signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
