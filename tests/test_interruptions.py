"""A run that is stopped, killed, short of disk or not alone: nothing is lost, and it goes on exactly."""

import itertools
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from test_engine import arguments_of, train

import data_rechunk
import engine
import mtl_vis
import oeq_weighting
from data_rechunk import InputError, Stopped
from models import MTLNet
from utils import UncertaintyLoss


def stop_at_step(monkeypatch, number, step):
    """Let the process send itself the signal `number` in the middle of its training step `step`."""
    original, count = torch.optim.AdamW.step, itertools.count(1)

    def optimizer_step(*args, **kw):
        original(*args, **kw)
        if next(count) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, 'step', optimizer_step)


def same(one, two):
    """Whether two nested values are equal in every bit, but for seconds."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            same(one[key], two[key]) for key in one if 'second' not in str(key))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def contents(out):
    return [torch.load(out / name, weights_only=True) for name in ('last.pt', 'best.pt')]


def test_a_run_stopped_twice_and_resumed_ends_with_the_same_bits(shared_data, tmp_path, monkeypatch):
    """In the middle of the first epoch and after the last step of the second, with two loading processes.

    There are three steps in an epoch; dropout and learned weights are part of it.
    """
    def run(out, *more):
        train(shared_data, tmp_path / out, '--epochs', '3', '--workers', '2', *more,
              weighting=UncertaintyLoss(MTLNet.tasks))

    run('whole')
    for here, step, more in (2, 2, ()), (4, 6, ('--resume',)):
        with monkeypatch.context() as patch:
            stop_at_step(patch, signal.SIGTERM, here)
            with pytest.raises(Stopped, match='go on with the same command and --resume') as stopped:
                run('parts', *more)
        assert stopped.value.status == 143
        last = torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)
        assert len(last['history']) * 3 + last['steps'] == step
    run('parts', '--resume')
    assert same(contents(tmp_path / 'whole'), contents(tmp_path / 'parts'))


def test_the_number_of_loading_processes_changes_no_bit(shared_data, tmp_path):
    for workers in '1', '2':
        train(shared_data, tmp_path / workers, '--workers', workers, '--epochs', '1')
    assert same(contents(tmp_path / '1'), contents(tmp_path / '2'))


def test_a_signal_in_the_evaluation_ends_it_after_the_batch_and_loses_no_step(shared_data, tmp_path, monkeypatch):
    train(shared_data, tmp_path / 'whole')
    evaluated, forward, batches_of = [], engine.forward, engine.batches_of

    def evaluated_forward(model, batch):
        if not model.training:
            evaluated.append(len(batch[0]))
            os.kill(os.getpid(), signal.SIGINT)
        return forward(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'forward', evaluated_forward)
        patch.setattr(engine, 'batches_of', lambda order, size: batches_of(order, 4 if len(order) == 12 else size))
        with pytest.raises(Stopped, match='in epoch 1, after 3 steps') as stopped:
            train(shared_data, tmp_path / 'parts')
    assert stopped.value.status == 130 and evaluated == [4]
    train(shared_data, tmp_path / 'parts', '--resume')
    assert same(contents(tmp_path / 'whole'), contents(tmp_path / 'parts'))


def test_a_checkpoint_is_written_within_the_epoch_when_it_is_time(shared_data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(engine, 'save_state', lambda state, folder: written.append(len(state['history']) * 3 + state['steps']))
    train(shared_data, tmp_path / 'often', '--checkpoint-minutes', '1e-9')
    assert written == [1, 2, 3, 4, 5, 6]
    written.clear()
    train(shared_data, tmp_path / 'seldom')
    assert written == [3, 6]


def test_without_resume_an_unfinished_run_is_not_overwritten(shared_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_step(patch, signal.SIGTERM, 2)
        with pytest.raises(Stopped):
            train(shared_data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match='holds an unfinished run; --resume goes on with it'):
        train(shared_data, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    train(shared_data, tmp_path, '--resume')
    train(shared_data, tmp_path)  # over a finished one


def test_stopped_before_its_first_step_a_run_leaves_the_finished_one_as_it_was(shared_data, tmp_path, monkeypatch):
    train(shared_data, tmp_path, '--epochs', '1')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(engine, 'belong_together', lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(shared_data, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.fixture(scope='module')
def whole(shared_data, tmp_path_factory):
    """The folder of an uninterrupted run of two epochs, not to be changed."""
    out = tmp_path_factory.mktemp('whole')
    train(shared_data, out)
    return out


def stopped(shared_data, out, monkeypatch):
    """A run like `whole`, stopped in its second epoch, with a checkpoint of each step."""
    with monkeypatch.context() as patch:
        stop_at_step(patch, signal.SIGTERM, 5)
        with pytest.raises(Stopped):
            train(shared_data, out, '--checkpoint-minutes', '1e-9')


@pytest.mark.parametrize('spoil', [
    lambda out: None,
    lambda out: (out / 'last.pt').unlink(),
    lambda out: (out / 'last.pt').write_bytes((out / 'last.pt').read_bytes()[:-1000]),
    lambda out: [path.unlink() for path in out.iterdir()],
], ids=['sound', 'last.pt missing', 'last.pt cut off', 'nothing there'])
def test_resume_auto_takes_the_newest_sound_checkpoint_or_starts(shared_data, whole, tmp_path, monkeypatch, spoil):
    stopped(shared_data, tmp_path, monkeypatch)
    spoil(tmp_path)
    train(shared_data, tmp_path, '--resume', 'auto')
    assert same(contents(whole), contents(tmp_path))


def test_a_damaged_last_checkpoint_is_kept_and_never_follows_the_one_before_it(shared_data, tmp_path, monkeypatch, capsys):
    stopped(shared_data, tmp_path, monkeypatch)
    (tmp_path / 'last.pt').write_bytes(b'damaged')
    with pytest.raises(InputError, match='last.pt: not a sound checkpoint'):
        train(shared_data, tmp_path, '--resume')
    path = engine.find_state(tmp_path, 'auto')
    content = load_checkpoint(path, TRAINING_FORMAT)
    assert path.name == 'previous.pt' and content['steps'] == 1
    assert 'warning: ' in capsys.readouterr().out and (tmp_path / 'damaged_last.pt').read_bytes() == b'damaged'
    save_last(tmp_path, content)
    assert load_checkpoint(tmp_path / 'previous.pt', TRAINING_FORMAT)['steps'] == 1


@pytest.mark.parametrize('entry, value', [
    ('history', [{}]), ('history', []), ('history', {}), ('best', {}), ('best', 'text'), ('best', None),
    ('schedule', {'total_steps': 1}), ('schedule', {}), ('steps', 99), ('steps', -1), ('steps', 1.0),
    ('sums', {'mask': 'a'}), ('seconds', None), ('model', None), ('config', 7), ('optimizer', {'state': {}}),
    ('best_model', None), ('best_model', {}), ('best_model', {'class_names': list('abcdefgh')}),
    ('best_model', {'weights': {}}),
])
def test_a_checkpoint_with_an_impossible_entry_is_refused(shared_data, whole, tmp_path, entry, value):
    content = torch.load(whole / 'last.pt', weights_only=True)
    if value and entry in ('schedule', 'best_model'):
        value = content[entry] | value
    torch.save(content | {entry: value}, tmp_path / 'last.pt')
    with pytest.raises(InputError, match='last.pt: does not fit this training'):
        train(shared_data, tmp_path, '--resume')
    assert [path.name for path in tmp_path.iterdir()] == ['last.pt']


def set_all(places, key, value):
    for place in places:
        place[key] = value


def tower(floors=21):
    """Small, and endless to who goes through all of it."""
    value = ['x']
    for _ in range(floors):
        value = [value, value]
    return value


@pytest.mark.parametrize('change', [
    lambda content: set_all(content['optimizer']['param_groups'], 'amsgrad', True),
    lambda content: set_all(content['optimizer']['param_groups'], 'differentiable', True),
    lambda content: content['optimizer']['param_groups'][0]['params'].reverse(),
    lambda content: set_all(content['optimizer']['state'].values(), 'exp_avg', None),
    lambda content: [set_all([moments], 'exp_avg', torch.zeros(1).expand(moments['exp_avg'].shape))
                     for moments in content['optimizer']['state'].values()],
    lambda content: set_all(content['history'], 'val_dice', 10**400),
    lambda content: set_all(content['history'], 'val_dice', -1e305),
    lambda content: set_all(content['history'], 'val_\ud800', 0.5),
    lambda content: content['history'][1].pop('total_seconds'),
    lambda content: content.update(history=[tower()] * 2),
    lambda content: content['config'].update(network=tower()),
    lambda content: content.update(seconds=float('nan')),
], ids=['amsgrad', 'differentiable', 'order', 'no moment', 'strides', 'long number', 'huge number', 'name', 'no seconds',
        'nested history', 'nested configuration', 'seconds'])
def test_a_checkpoint_made_to_do_harm_is_refused(shared_data, whole, tmp_path, change):
    """A moment of other strides lets the optimiser write beyond it; other options end in a traceback."""
    content = torch.load(whole / 'last.pt', weights_only=True)
    change(content)
    torch.save(content, tmp_path / 'last.pt')
    with pytest.raises(InputError, match='last.pt: does not fit this training') as error:
        train(shared_data, tmp_path, '--resume')
    assert len(str(error.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ['last.pt']


def test_before_a_run_takes_the_place_of_a_finished_one_the_finished_one_is_unmarked(tmp_path, monkeypatch):
    """Or, killed in between, it would look finished and could be overwritten."""
    for number in 1, 2:
        (tmp_path / 'metrics.json').touch()
        with monkeypatch.context() as patch:
            if number == 2:
                def killed(source, target):
                    if target.name == 'last.pt':
                        raise SystemExit
                    return os.rename(source, target)

                patch.setattr(os, 'replace', killed)
            try:
                save_last(tmp_path, {'number': number})
            except SystemExit:
                pass
    assert torch.load(tmp_path / 'last.pt') == {'number': 1} and not (tmp_path / 'metrics.json').exists()


@pytest.mark.parametrize('part', ['model', 'best_model'])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(shared_data, whole, tmp_path, part):
    content = torch.load(whole / 'last.pt', weights_only=True)
    state = content['best_model']['weights'] if part == 'best_model' else content[part]
    next(iter(state.values()))[0] = torch.nan
    torch.save(content, tmp_path / 'last.pt')
    with pytest.raises(InputError, match='last.pt: does not fit this training .some of its weights are not finite'):
        train(shared_data, tmp_path, '--resume')


def test_what_is_made_from_a_checkpoint_is_made_again_where_it_is_missing(shared_data, whole, tmp_path):
    (tmp_path / 'last.pt').write_bytes((whole / 'last.pt').read_bytes())
    train(shared_data, tmp_path, '--resume')
    assert same(contents(whole), contents(tmp_path))
    for name in 'log.csv', 'curves.png':
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()


def test_killed_between_its_files_a_run_over_a_finished_one_mixes_nothing(shared_data, whole, tmp_path, monkeypatch):
    """After the first last.pt, when best.pt, log.csv and curves.png are still those of the earlier run."""
    train(shared_data, tmp_path, '--seed', '1')
    earlier = (tmp_path / 'best.pt').read_bytes()

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'write_epoch', killed)
        with pytest.raises(SystemExit):
            train(shared_data, tmp_path)
    assert (tmp_path / 'best.pt').read_bytes() == earlier and not (tmp_path / 'metrics.json').exists()
    train(shared_data, tmp_path, '--resume')
    assert same(contents(whole), contents(tmp_path))


def test_two_runs_in_one_folder_at_once_are_refused(shared_data, tmp_path):
    with files.lock_folder(tmp_path):
        with pytest.raises(InputError, match='another process is writing to this folder'):
            train(shared_data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_signals_to_all_processes_at_once_wait_for_the_step_too(shared_data, tmp_path):
    """As from the terminal, timeout or a batch system: the loading processes get them as well."""
    out = tmp_path / 'run'
    code = 'import train_mtl, data_rechunk; run_script(train_mtl.main)'
    command = [sys.executable, '-c', code, *arguments_of(shared_data, out), '--epochs', '500', '--workers', '2',
               '--model', str(tmp_path / 'model.pt')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        while 'epoch 1/500' not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)  # timeout sends it to the process and to its group
        _, error = process.communicate()
    assert process.returncode == 143 and 'Traceback' not in error
    assert error.splitlines()[-1].endswith('last.pt is written; go on with the same command and --resume')
    load_checkpoint(out / 'last.pt', TRAINING_FORMAT)


TWO_PROCESSES = """
import os, signal, sys, torch
import data_rechunk, train_mtl
step, steps = torch.optim.AdamW.step, []
def stop(*args, **kw):
    step(*args, **kw)
    steps.append(1)
    if len(steps) == 2 and os.environ['RANK'] == '1' and '--resume' not in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
if 'whole' not in sys.argv[0]:
    torch.optim.AdamW.step = stop
run_script(train_mtl.main)
"""


def test_a_signal_to_one_of_two_processes_stops_both_after_the_step_and_both_go_on(shared_data, tmp_path):
    def run(name, *more):
        script = tmp_path / f'{name}.py'
        script.write_text(TWO_PROCESSES)
        return subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script),
             *arguments_of(shared_data, tmp_path / name), '--model', str(tmp_path / 'model.pt'), '--epochs', '1', *more],
            capture_output=True, text=True, timeout=300)

    whole, stopped = run('whole'), run('parts')
    assert whole.returncode == 0, whole.stderr
    assert stopped.returncode and 'in epoch 1, after 2 steps of it' in stopped.stderr, stopped.stderr
    resumed = run('parts', '--resume')
    assert resumed.returncode == 0, resumed.stderr
    assert same(contents(tmp_path / 'whole'), contents(tmp_path / 'parts'))


@pytest.mark.parametrize('limit, write, name', [
    (1000, lambda folder: engine.save_state({'format': TRAINING_FORMAT, 'x': torch.zeros(5000)}, folder), 'last.pt'),
    (10, lambda folder: engine.write_log([{'epoch': 1, 'lr': 0.1}], folder / 'log.csv'), 'log.csv'),
    (99, lambda folder: engine.draw_curves([{'epoch': 1}], folder / 'curves.png'), 'curves.png'),
    (99, lambda folder: mtl_vis.save_picture([[('', torch.zeros(3, 9, 9))]], folder / 'mask.png'), 'mask.png'),
])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, limit, write, name):
    for each in name, 'metrics.json':
        (tmp_path / each).write_bytes(b'before')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as error:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f'{tmp_path / name}: cannot be written and is left as it was (File too large)'
    assert (tmp_path / name).read_bytes() == (tmp_path / 'metrics.json').read_bytes() == b'before'
    assert {path.name for path in tmp_path.iterdir()} <= {name, 'metrics.json', 'previous.pt'}


def test_several_processes_train_from_the_files_that_another_reads(shared_data, tmp_path):
    code = 'import train_baseline, data_rechunk; run_script(train_baseline.main)'
    dataset = engine.MTLDataset('train', root=shared_data)
    dataset[0]
    processes = [subprocess.Popen([sys.executable, '-c', code, *arguments_of(shared_data, tmp_path / str(number)), '--epochs', '1'],
                                  env={**os.environ, 'HDF5_USE_FILE_LOCKING': locking, 'OMP_NUM_THREADS': '1'})
                 for number, locking in enumerate(['TRUE', 'FALSE'])]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(dataset) == sum(1 for _ in (dataset[i] for i in range(len(dataset))))


def test_resume_auto_keeps_its_hands_off_a_checkpoint_of_another_format(shared_data, tmp_path):
    for name in 'last.pt', 'previous.pt':
        torch.save({'format': 'segmentation-mtl training 1'}, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="last.pt: a file of the format 'segmentation-mtl training 1'"):
        train(shared_data, tmp_path, '--resume', 'auto')
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_last_checkpoint_on_another_disk_stays_there_and_is_no_link_to_itself(tmp_path):
    (tmp_path / 'disk').mkdir()
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'last.pt').symlink_to(tmp_path / 'disk' / 'last.pt')
    for number in range(3):
        save_last(out, {'number': number})
    assert torch.load(tmp_path / 'disk' / 'last.pt') == torch.load(out / 'last.pt') == {'number': 2}
    assert torch.load(out / 'previous.pt') == {'number': 1}


def test_a_signal_after_the_last_check_is_not_forgotten():
    with pytest.raises(Stopped) as stopped:
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.status == 143


@pytest.mark.parametrize('also', [(), ('metrics.json',)], ids=['unfinished', 'finished'])
def test_a_folder_of_weightings_is_not_trained_over(shared_data, tmp_path, also):
    """Stopped and resumed, it would meet runs of other options."""
    (tmp_path / 'uncertainty').mkdir()
    for name in 'last.pt', *also:
        (tmp_path / 'uncertainty' / name).touch()
    with pytest.raises(InputError, match='uncertainty: holds a run; --resume'):
        oeq_weighting.main(arguments_of(shared_data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['uncertainty']
