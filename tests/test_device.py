"""The machine that a run uses: device, precision, seeds."""

import ctypes

import pytest
import torch

from support.cli import InputError
from support.device import choose_device, has_fast_bfloat16, keep_freed_memory, seed_everything


def test_device_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert choose_device('auto') == choose_device('cpu') == torch.device('cpu')
    with pytest.raises(InputError, match='--device cuda: torch finds no CUDA device here; use --device cpu'):
        choose_device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    assert choose_device('auto') == choose_device('cuda') == torch.device('cuda', 1)
    assert choose_device('cpu') == torch.device('cpu')


@pytest.mark.parametrize('avx, amx', [(False, False), (True, False), (False, True)])
def test_bfloat16_where_the_cpu_computes_in_it(monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert has_fast_bfloat16(torch.device('cpu')) == (avx or amx)


def test_seeds_of_a_key_are_the_same_each_time_and_others_for_other_keys():
    def draw(*key):
        return seed_everything(*key), torch.rand(1).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = [(0,), (1,), (0, 1), (1, 1), (0, 1, 1), (0, 1, 1, 1), (2**32 - 1, 1)]
    for column in zip(*(draw(*key) for key in keys)):
        assert len(set(column)) == len(keys)


def test_keep_freed_memory_does_nothing_without_glibc(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, 'CDLL', missing)
    keep_freed_memory()
