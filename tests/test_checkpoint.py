"""Checkpoint files: written whole, and only sound ones of the right kind are read."""

import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import read_folder

from support.checkpoint import MODEL_FORMAT, TRAINING_FORMAT, load_checkpoint, save_checkpoint, save_last
from support.cli import InputError

CONTENT = {'format': TRAINING_FORMAT, 'weights': {'a': torch.arange(1000.0)}, 'steps': 2}


@pytest.fixture
def path(tmp_path):
    """A sound checkpoint."""
    save_checkpoint(tmp_path / 'last.pt', CONTENT)
    return tmp_path / 'last.pt'


# ---- reading


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'not a valid checkpoint (File is not a zip file)'),
        ({'layer.weight': torch.zeros(3)}, 'another kind of PyTorch file, such as a state dict'),
        (torch.zeros(3), 'another kind of PyTorch file'),
        ({'format': MODEL_FORMAT}, f"a file of the format '{MODEL_FORMAT}'"),
    ],
    ids=['empty', 'state dict', 'tensor', 'model'],
)
def test_file_of_another_kind_is_refused(path, content, message):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(path, TRAINING_FORMAT)
    assert str(error.value).startswith(f'{path}: {message}') and '\n' not in str(error.value)
    assert str(error.value).endswith(f"; expected '{TRAINING_FORMAT}', which the training scripts write")


def test_changed_byte_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[content.index(CONTENT['weights']['a'].numpy().tobytes()) + 2000] ^= 4
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)['steps'] == 2  # torch does not notice
    with pytest.raises(InputError, match='last.pt: not a valid checkpoint .its part .* is damaged'):
        load_checkpoint(path, TRAINING_FORMAT)


def test_compressed_archive_is_refused(path):
    """It could unpack to much more than its size."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10_000_000))
    with pytest.raises(InputError, match='last.pt: not a valid checkpoint .a compressed archive'):
        load_checkpoint(path, TRAINING_FORMAT)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'created',)

    path, content = tmp_path / 'code.pt', {'format': MODEL_FORMAT, 'weights': Code()}
    torch.save(content, path)
    with pytest.raises(InputError, match='code.pt: not a valid checkpoint .it holds more than plain weights.'):
        load_checkpoint(path, MODEL_FORMAT)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match='code.pt: not a valid checkpoint .File is not a zip file.'):
        load_checkpoint(path, MODEL_FORMAT)
    assert not (tmp_path / 'created').exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / 'created').exists()


# ---- writing


def test_metrics_of_a_finished_run_are_removed_before_last_checkpoint_is_replaced(tmp_path, monkeypatch):
    """Otherwise a run that was killed in between would look finished and could be overwritten."""
    save_last(tmp_path, {'number': 1})
    (tmp_path / 'metrics.json').touch()
    replace = os.replace

    def killed(source, target):
        if Path(target).name == 'last.pt':
            raise SystemExit
        replace(source, target)

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(SystemExit):
        save_last(tmp_path, {'number': 2})
    assert torch.load(tmp_path / 'last.pt') == {'number': 1} and not (tmp_path / 'metrics.json').exists()


def test_full_disk_leaves_the_last_checkpoint_and_the_metrics(tmp_path):
    (tmp_path / 'last.pt').write_bytes(b'before')
    (tmp_path / 'metrics.json').write_bytes(b'{}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError) as error:
            save_last(tmp_path, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f'{tmp_path}/last.pt: cannot be written and is left as it was (File too large)'
    assert read_folder(tmp_path) == {'last.pt': b'before', 'metrics.json': b'{}'}
