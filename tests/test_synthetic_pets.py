"""The drawn pets: seeded, balanced, and labelled exactly."""

from collections import Counter

import numpy as np
import pytest

from synthetic_pets import BREEDS, draw_background, draw_pet

PETS = [draw_pet(index, size=128) for index in range(40)]


def test_a_pet_depends_on_seed_and_index_alone():
    for one, two in zip(draw_pet(5, seed=1), draw_pet(5, seed=1)):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(draw_pet(5, seed=1).image, draw_pet(5, seed=2).image)
    assert not np.array_equal(draw_pet(5, seed=1).mask, draw_pet(13, seed=1).mask)


def test_background_is_the_picture_without_the_pet():
    for pet, index in zip(PETS, range(6)):
        difference = np.abs(draw_background(index, size=128).astype(int) - pet.image).mean(axis=2)
        inside = pet.mask[..., 0] == 1
        assert difference[~inside].mean() < 2 and difference[inside].mean() > 20


def test_masks_are_pet_and_background_in_sensible_shares():
    for pet in PETS:
        assert set(np.unique(pet.mask)) == {0, 1}
        assert 0.03 < pet.mask.mean() < 0.8


def test_the_head_box_lies_in_the_picture_and_on_the_pet():
    for pet in PETS:
        xmin, ymin, xmax, ymax = pet.bbox
        assert 0 <= xmin < xmax <= 128 and 0 <= ymin < ymax <= 128
        inside = pet.mask[int(ymin) : int(ymax), int(xmin) : int(xmax)]
        assert inside.mean() > 0.4
        assert inside.sum() < 0.95 * pet.mask.sum()  # there is more to a pet than its head


def test_breeds_are_balanced_and_decide_species_and_name():
    assert set(Counter(pet.breed for pet in PETS).values()) == {5}
    assert {breed.species for breed in BREEDS} == {0, 1}
    for index, pet in enumerate(PETS):
        assert pet.species == BREEDS[pet.breed].species
        assert pet.name == f'{BREEDS[pet.breed].name}_{index}'


@pytest.mark.parametrize('size', [64, 96, 256])
def test_drawn_pet_scales_with_size(size):
    pet = draw_pet(7, size=size)
    assert pet.image.shape == (size, size, 3) and pet.image.dtype == np.uint8
    assert pet.mask.shape == (size, size, 1) and pet.mask.dtype == np.uint8
    assert pet.mask.mean() == pytest.approx(PETS[7].mask.mean(), abs=0.02)
    np.testing.assert_allclose(pet.bbox / size, PETS[7].bbox / 128, atol=0.03)
