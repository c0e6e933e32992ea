"""The drawn pets: seeded, balanced, and labelled exactly."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from support.synthetic_pets import BREEDS, draw_background, draw_pet

PETS = [draw_pet(index, size=128) for index in range(40)]


def test_seed_and_index_decide_every_byte():
    for one, two in zip(draw_pet(5, seed=1), draw_pet(5, seed=1)):
        np.testing.assert_array_equal(one, two)
    for other in (draw_pet(5, seed=2), draw_pet(13, seed=1)):  # pets of the same breed
        assert not np.array_equal(draw_pet(5, seed=1).image, other.image)
        assert not np.array_equal(draw_pet(5, seed=1).mask, other.mask)


def test_the_pet_changes_the_background_where_its_mask_is_and_nowhere_else():
    for index, pet in enumerate(PETS):
        changed = (draw_background(index, size=128) != pet.image).any(axis=2)
        mask = Image.fromarray(pet.mask[..., 0])
        near = np.asarray(mask.filter(ImageFilter.MaxFilter(9)))  # blur reaches a few pixels beyond the mask
        assert not changed[near == 0].any()
        assert changed[pet.mask[..., 0] == 1].mean() > 0.98


def test_masks_are_pet_and_background_in_sensible_shares():
    for pet in PETS:
        assert set(np.unique(pet.mask)) == {0, 1}
        assert 0.03 < pet.mask.mean() < 0.8


def test_the_head_box_lies_in_the_masks_box_and_on_the_pet():
    for pet in PETS:
        xmin, ymin, xmax, ymax = pet.bbox.astype(int)
        left, top, right, bottom = Image.fromarray(pet.mask[..., 0]).getbbox()
        assert left <= xmin < xmax <= right and top <= ymin < ymax <= bottom
        inside = pet.mask[ymin:ymax, xmin:xmax]
        assert inside.mean() > 0.4
        assert inside.sum() < 0.95 * pet.mask.sum()  # there is more to a pet than its head


def test_breeds_are_balanced_and_decide_species_and_name():
    assert set(Counter(pet.breed for pet in PETS).values()) == {5}
    assert {breed.species for breed in BREEDS} == {0, 1}
    for index, pet in enumerate(PETS):
        assert pet.species == BREEDS[pet.breed].species
        assert pet.name == f'{BREEDS[pet.breed].name}_{index}'


@pytest.mark.parametrize('size', [64, 96, 256])
def test_a_pet_scales_with_the_size_of_its_picture(size):
    pet = draw_pet(7, size=size)
    assert pet.image.shape == (size, size, 3) and pet.image.dtype == np.uint8
    assert pet.mask.shape == (size, size, 1) and pet.mask.dtype == np.uint8
    assert pet.bbox.shape == (4,) and pet.bbox.dtype == np.float32
    assert pet.mask.mean() == pytest.approx(PETS[7].mask.mean(), abs=0.02)
    np.testing.assert_allclose(pet.bbox / size, PETS[7].bbox / 128, atol=0.03)
