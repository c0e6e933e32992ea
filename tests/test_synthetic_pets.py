"""The drawn pets: seeded, balanced, and labelled exactly."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from support.sources import SyntheticPets
from support.synthetic_pets import BREEDS, draw_background, draw_pet

pytestmark = pytest.mark.xdist_group('drawn pets')  # drawn once


@pytest.fixture(scope='module')
def pets():
    return [draw_pet(index, size=128) for index in range(8)]  # one of each breed


def test_seed_and_index_decide_every_byte():
    pet = draw_pet(5, seed=1)
    for one, two in zip(pet, draw_pet(5, seed=1)):
        np.testing.assert_array_equal(one, two)
    for other in draw_pet(5, seed=2), draw_pet(13, seed=1):  # pets of the same breed
        assert not np.array_equal(pet.image, other.image) and not np.array_equal(pet.mask, other.mask)


def test_the_pet_changes_the_background_where_its_mask_is_and_nowhere_else(pets):
    for index, pet in enumerate(pets):
        changed = (draw_background(index, size=128) != pet.image).any(axis=2)
        mask = Image.fromarray(pet.mask[..., 0])
        near = np.asarray(mask.filter(ImageFilter.MaxFilter(9)))  # blur reaches a few pixels beyond the mask
        assert not changed[near == 0].any()
        assert changed[pet.mask[..., 0] == 1].mean() > 0.98
        assert set(np.unique(pet.mask)) == {0, 1} and 0.03 < pet.mask.mean() < 0.8


def test_the_head_box_lies_in_the_masks_box_and_on_the_pet(pets):
    for pet in pets:
        xmin, ymin, xmax, ymax = pet.bbox.astype(int)
        left, top, right, bottom = Image.fromarray(pet.mask[..., 0]).getbbox()
        assert left <= xmin < xmax <= right and top <= ymin < ymax <= bottom
        inside = pet.mask[ymin:ymax, xmin:xmax]
        assert inside.mean() > 0.4
        assert inside.sum() < 0.95 * pet.mask.sum()  # there is more to a pet than its head


def test_breeds_are_balanced_and_decide_the_species():
    records = SyntheticPets(40, seed=0).records
    assert Counter(record.breed for record in records) == dict.fromkeys(range(8), 5)
    for record in records:
        assert record.name.startswith(BREEDS[record.breed].name) and record.species == BREEDS[record.breed].species


@pytest.mark.parametrize('size', [64, 256])
def test_a_pet_scales_with_the_size_of_its_picture(pets, size):
    pet = draw_pet(7, size=size)
    assert [(part.shape, part.dtype) for part in pet] == [
        ((size, size, 3), 'u1'),
        ((size, size, 1), 'u1'),
        ((4,), 'f4'),
    ]
    assert pet.mask.mean() == pytest.approx(pets[7].mask.mean(), abs=0.02)
    np.testing.assert_allclose(pet.bbox / size, pets[7].bbox / 128, atol=0.03)
