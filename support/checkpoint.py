"""Checkpoint files: written whole, and read without running code that they may contain."""

import os
import warnings
import zipfile

import torch

from support.cli import InputError, reason
from support.files import require_file, write_file

MODEL_FORMAT = 'segmentation-mtl model 1'  # mtl_model.pt, best.pt
TRAINING_FORMAT = 'segmentation-mtl training 4'  # last.pt


def save_checkpoint(path, content):
    """Write a dict of tensors and plain values with the entry 'format'."""
    write_file(path, lambda file: torch.save(content, file))


def save_last(folder, content):
    """Write last.pt, and remove the metrics.json of a finished run, which this one then is not any more."""

    def save(file):
        torch.save(content, file)
        (folder / 'metrics.json').unlink(missing_ok=True)

    write_file(folder / 'last.pt', save)


def load_checkpoint(path, expected, device='cpu'):
    """The content of a checkpoint whose 'format' is `expected`, its tensors on `device`.

    No code in the file runs, and a single changed bit is noticed. Raises InputError for any other file.
    """
    require_file(path, 'the training scripts make it')
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, about files that are refused below
            content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f'{path}: cannot be read ({reason(error)})') from None
    except Exception as error:  # torch.load raises errors of any type for damaged files
        said = 'it holds more than plain weights' if 'weights_only' in str(error) else reason(error)
        raise InputError(
            f"{path}: not a sound checkpoint ({said}); expected '{expected}', which the training scripts write"
        ) from None
    found = content.get('format') if isinstance(content, dict) else None
    if not isinstance(found, str) or found != expected:
        what = 'another kind of PyTorch file, such as a state dict'
        if isinstance(found, str):
            what = f'a file of the format {found!r:.50}'
        raise InputError(f"{path}: {what}; expected '{expected}', which the training scripts write")
    return content


def check_archive(path):
    """Raises ValueError unless the file is an uncompressed zip archive with the right checksums.

    torch.save writes such archives, and torch.load ignores the checksums.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError('a compressed archive')
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part '{damaged}' is damaged")


def is_finite(state_dict):
    """Whether all tensors of a state dict are free of NaN and infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in state_dict.values())


def find_checkpoint(folder, resume):
    """The last.pt that --resume asks for; None to start anew. Raises InputError for an unfinished run in the way."""
    last = folder / 'last.pt'
    if resume == 'auto' and not os.path.lexists(last):
        return None
    if not resume and last.exists() and not (folder / 'metrics.json').exists():
        raise InputError(
            f'{folder}: holds an unfinished run; --resume goes on with it; to start anew, remove its last.pt or '
            'give another --out'
        )
    return last if resume else None
