"""Draw seeded cats and dogs with an exact mask, head box, species and breed.

    python synthetic_pets.py                                    # 24 pets as synthetic_pets.png
    python synthetic_pets.py --count 12 --out pets.png --seed 3 --size 128

Expect a contact sheet in which every pet has its mask outlined in green and its head boxed in red,
and one line with the mean coverage; a second or so in all. `draw_pet` is what other scripts use: about
15 ms for each 256 x 256 pet, the same bytes for the same seed, index and size.

How it works: a pose function builds the pet back to front as a list of `Part`s, polygons in "pose
units" (about one head radius; x to the right, y down, the pet facing left). The whole list is then
flipped, rotated, scaled and moved at once, and `Canvas.paint` fills each polygon in the picture and
in the mask with one and the same stencil, so that the two cannot disagree. Everything inside a part
(stripes, eyes, collar) is a `Mark`, which the stencil clips, so that it cannot change the mask.

The breed shows in the coat's colours and pattern as well as in ears, muzzle, legs and tail. The
backgrounds take half of their colours from the coats: colour alone does not tell pet from picture.
"""

import argparse
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 2      # the picture is drawn this many times larger and averaged down

DARK = (28, 22, 22)
PINK = (214, 140, 140)


class Breed(NamedTuple):
    """What decides how the pets of one breed look.

    Colours are RGB, 0-255; lengths are in pose units, about one head radius.
    """
    name: str
    species: int         # 0 cat, 1 dog
    pattern: str         # solid, stripes, points, patches, spots, saddle or brows
    coat: tuple          # main colour
    marking: tuple       # colour of the pattern
    accent: tuple        # colour of the muzzle, of the second kind of patch and of the brows
    eye: tuple
    ears: str            # pointed, tall, floppy or long
    muzzle: float        # how far the muzzle reaches, 0 for the flat face of a cat
    length: float        # of the body, from shoulder to rump
    legs: float
    girth: float
    tail: float          # its half width: 0.15 thin, 0.4 bushy
    fluff: float         # depth of the ragged outline, as a fraction of the radius


BREEDS = (
    Breed('ginger_tabby', 0, 'stripes', (222, 142, 66), (160, 82, 28), (246, 222, 190),
          (150, 180, 70), 'pointed', 0.0, 2.6, 1.45, 0.80, 0.18, 0.0),
    Breed('black_shorthair', 0, 'solid', (44, 42, 48), (44, 42, 48), (62, 60, 66),
          (236, 200, 50), 'pointed', 0.0, 2.4, 1.4, 0.82, 0.17, 0.0),
    Breed('siamese_point', 0, 'points', (230, 214, 188), (84, 62, 54), (84, 62, 54),
          (80, 160, 230), 'tall', 0.0, 2.8, 1.75, 0.64, 0.13, 0.0),
    Breed('calico_longhair', 0, 'patches', (240, 234, 226), (212, 124, 48), (56, 48, 46),
          (170, 170, 60), 'pointed', 0.0, 2.4, 1.25, 0.92, 0.42, 0.13),
    Breed('spotted_hound', 1, 'spots', (238, 236, 232), (40, 38, 40), (238, 236, 232),
          (84, 56, 34), 'floppy', 0.95, 2.7, 2.1, 0.76, 0.13, 0.0),
    Breed('saddle_shepherd', 1, 'saddle', (188, 134, 78), (46, 40, 38), (66, 54, 48),
          (96, 62, 30), 'tall', 1.1, 2.9, 1.8, 0.86, 0.34, 0.07),
    Breed('golden_longcoat', 1, 'solid', (220, 174, 104), (220, 174, 104), (238, 206, 152),
          (70, 44, 26), 'floppy', 0.85, 2.7, 1.65, 0.94, 0.42, 0.13),
    Breed('chocolate_longback', 1, 'brows', (94, 54, 38), (94, 54, 38), (204, 140, 82),
          (60, 38, 24), 'long', 1.0, 4.0, 0.8, 0.74, 0.16, 0.0),
)

# Which roles of a pattern are wholly in the marking's colour.
MARKED_ROLES = {'points': ('leg', 'tail', 'ear'), 'saddle': ('tail', 'ear'), 'spots': ('ear',)}


class Pet(NamedTuple):
    """One drawn pet; H = W = the size asked for.

    image: uint8 (H, W, 3), RGB, 0-255.
    mask: uint8 (H, W, 1), 1 pet, 0 background.
    bbox: float32 (4,), xmin, ymin, xmax, ymax of the head with its ears, in pixels within
        [0, size]; xmax and ymax are the outer edges of the last pixel, so the area is positive.
    species: 0 cat, 1 dog.
    breed: index into BREEDS.
    name: the breed's name and the index of the pet, unique within a set.
    """
    image: np.ndarray
    mask: np.ndarray
    bbox: np.ndarray
    species: int
    breed: int
    name: str


class Mark(NamedTuple):
    """Paint inside a part: a filled polygon, or a line where a width is given."""
    points: np.ndarray
    colour: tuple
    width: float = 0.0


class Part(NamedTuple):
    """One opaque piece of the pet: a polygon, its colour, and the marks clipped to it."""
    points: np.ndarray
    colour: tuple
    marks: list
    head: bool


# ---------------------------------------------------------------------------------------- shapes

def _shade(colour, factor):
    return tuple(int(c) for c in np.clip(np.multiply(colour, factor), 0, 255))


def _jitter(rng, colour, spread):
    """Vary brightness by up to `spread` (a fraction) and each channel by a third of that."""
    return _shade(colour, rng.uniform(1 - spread, 1 + spread)
                  * rng.uniform(1 - spread / 3, 1 + spread / 3, 3))


def _rotation(angle):
    """Matrix that turns row vectors, `points @ matrix`, by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _ragged(rng, count, fluff):
    """Factors for a tufted outline: every second point stands out. All 1 without fluff."""
    return 1 + fluff * rng.uniform(0.2, 1.0, count) * (np.arange(count) % 2)


def _blob(rng, x, y, rx, ry, fluff=0.0, count=36):
    """Ellipse, or a tufted one."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    reach = _ragged(rng, count, fluff)
    return np.stack([x + rx * reach * np.cos(angle), y + ry * reach * np.sin(angle)], 1)


def _tube(rng, *nodes, fluff=0.0, count=18):
    """Rounded tube along the Bezier curve of the `nodes`, each x, y, half width."""
    curve = np.array(nodes, float)
    t = np.linspace(0, 1, count)[:, None, None]
    curve = np.broadcast_to(curve, (count, *curve.shape))
    while curve.shape[1] > 1:                                        # de Casteljau
        curve = curve[:, :-1] * (1 - t) + curve[:, 1:] * t
    centre, width = curve[:, 0, :2], curve[:, 0, 2]
    along = np.gradient(centre, axis=0)
    heading = np.arctan2(along[:, 1], along[:, 0])
    # Down one side, round the end, back up the other side and round the start.
    cap = np.linspace(np.pi / 2, -np.pi / 2, 8)[1:-1]
    angle = np.concatenate([heading + np.pi / 2, heading[-1] + cap,
                            heading[::-1] - np.pi / 2, heading[0] - np.pi + cap])
    where = np.r_[0:count, [count - 1] * 6, count - 1:-1:-1, [0] * 6]
    reach = (width[where] * _ragged(rng, len(where), fluff))[:, None]
    return centre[where] + reach * np.stack([np.cos(angle), np.sin(angle)], 1)


# --------------------------------------------------------------------------------------- the pet

class Sketch:
    """Builds one pet of a breed in pose units: `parts`, back to front."""

    def __init__(self, breed, rng):
        self.breed, self.rng = breed, rng
        self.coat = _jitter(rng, breed.coat, 0.12)
        self.marking = _jitter(rng, breed.marking, 0.12)
        self.accent = _jitter(rng, breed.accent, 0.10)
        self.parts = []

    def add(self, points, role, marks=(), far=False, colour=None):
        """Add a part in the coat's colour and pattern for its role; `far` parts are in shadow."""
        if colour is None:
            colour = self.role_colour(role)
            marks = [*self.pattern(points, role, colour), *marks]
        if far:
            colour = _shade(colour, 0.78)
            marks = [mark._replace(colour=_shade(mark.colour, 0.78)) for mark in marks]
        head = role in ('head', 'ear', 'muzzle')
        self.parts.append(Part(points, colour, list(marks), head))

    def role_colour(self, role):
        breed = self.breed
        if role in MARKED_ROLES.get(breed.pattern, ()):
            return self.marking
        if role == 'muzzle':
            return self.accent
        if breed.pattern == 'patches' and role in ('tail', 'ear', 'leg'):
            return (self.coat, self.marking, self.accent)[self.rng.choice(3, p=(
                (0.8, 0.1, 0.1) if role == 'leg' else (0.0, 0.5, 0.5)))]
        return self.coat

    def pattern(self, points, role, colour):
        """The breed's marks for a part; none where the role has a colour of its own."""
        rng, pattern = self.rng, self.breed.pattern
        if colour != self.coat or role in ('ear', 'muzzle'):
            return []
        low, high = points.min(0), points.max(0)
        span, middle = high - low, (low + high) / 2
        if pattern == 'stripes' and role != 'head':
            return self.stripes(low, span)
        if pattern == 'spots':
            count = int(np.clip(span[0] * span[1] * 4, 3, 40))
            places = low + span * rng.uniform(0, 1, (count, 2))
            sizes = rng.uniform(0.05, 0.15, (count, 2))
            return [Mark(_blob(rng, *place, *size, count=10), self.marking)
                    for place, size in zip(places, sizes)]
        if pattern == 'patches' and role in ('body', 'head'):
            places = low + span * rng.uniform(0.1, 0.9, (4, 2))
            return [Mark(_blob(rng, *place, *(rng.uniform(0.2, 0.36, 2) * span), 0.15),
                         (self.marking, self.accent)[i % 2]) for i, place in enumerate(places)]
        if pattern == 'saddle' and role == 'body':
            # The back is the upper side of a lying or standing body, the right of an upright one.
            x, y = (middle[0], low[1]) if span[0] > span[1] else (high[0], middle[1])
            return [Mark(_blob(rng, x, y, *(span * (0.42, 0.55)), 0.2), self.marking)]
        if pattern == 'brows' and role == 'leg':
            return [Mark(_blob(rng, middle[0], high[1], *(span * (0.9, 0.4))), self.accent)]
        return []

    def stripes(self, low, span):
        """Tapering bands across the longer side of the box at `low`, starting from the back."""
        rng, along = self.rng, int(span[1] > span[0])
        bands = []
        for start in np.arange(0.15, span[along], 0.42):
            start += rng.uniform(-0.08, 0.08)
            width, depth = rng.uniform(0.07, 0.12), rng.uniform(0.5, 0.85) * span[1 - along]
            band = np.array([(start - width, 0), (start + width, 0),
                             (start + rng.uniform(-0.2, 0.2), depth)])
            if along:
                band = np.stack([span[0] - band[:, 1], band[:, 0]], 1)
            bands.append(Mark(low + band, self.marking))
        return bands

    def leg(self, top, foot, far=False):
        """Leg from `top` to the ground at `foot`, the paw pointing forward (left)."""
        width = 0.2 + 0.12 * self.breed.girth
        (x, y), (fx, fy) = top, foot
        self.add(_tube(self.rng, (x, y, width * 1.35), (x, (y + fy) / 2, width),
                       (fx, fy - 0.15, width * 0.8), fluff=self.breed.fluff), 'leg', far=far)
        paw = _blob(self.rng, fx - 0.12, fy - 0.1, width * 1.25, 0.2)
        self.add(paw, 'leg', far=far, colour=self.accent if self.breed.pattern == 'brows' else None)

    def tail(self, *path):
        width = self.breed.tail
        nodes = [(x, y, width * w) for (x, y), w in zip(path, (0.7, 1.1, 1.2, 0.5))]
        self.add(_tube(self.rng, *nodes, fluff=self.breed.fluff * 2), 'tail')

    def neck(self, shoulder, head, width):
        """Neck between two points; every third pet wears a collar round it."""
        rng, marks = self.rng, []
        shoulder, head = np.array(shoulder), np.array(head)
        if rng.random() < 0.35:
            across = (head - shoulder) @ _rotation(np.pi / 2)
            across *= 2 * width / np.linalg.norm(across)
            middle = shoulder + 0.3 * (head - shoulder)
            band = np.array([middle - across, middle + across])
            marks = [Mark(band, tuple(rng.integers(20, 240, 3).tolist()), 0.2)]
        self.add(_tube(rng, (*shoulder, width * 1.15), (*head, width), fluff=self.breed.fluff),
                 'neck', marks)

    def head(self, x, y, radius, turn):
        """Head at (x, y); `turn` from -1, looking left, through 0, into the camera, to 1."""
        first = len(self.parts)
        if self.breed.species == 0:
            self.cat_head(turn)
        else:
            self.dog_head(turn)
        # The head was drawn round the origin with radius 1: put it in its place.
        linear = radius * _rotation(self.rng.uniform(-0.22, 0.22))

        def place(item):
            return item._replace(points=item.points @ linear + (x, y))

        self.parts[first:] = [
            place(part)._replace(marks=[place(mark)._replace(width=mark.width * radius)
                                        for mark in part.marks])
            for part in self.parts[first:]]

    def cat_head(self, turn):
        rng, breed, dx = self.rng, self.breed, 0.32 * turn
        self.upright_ears(dx)
        marks = []
        if breed.pattern == 'points':
            marks.append(Mark(_blob(rng, dx, 0.28, 0.62, 0.6), self.marking))
        if breed.pattern == 'stripes':
            marks += [Mark(np.array([(dx + s - 0.07, -0.95), (dx + s + 0.07, -0.95),
                                     (dx + s * 0.7, -0.36)]), self.marking)
                      for s in (-0.3, 0.0, 0.3)]
            marks += [Mark(np.array([(s * 1.05, h), (s * 1.05, h + 0.16), (dx + s * 0.6, h)]),
                           self.marking) for s in (-1, 1) for h in (-0.02, 0.26)]
        if breed.pattern in ('stripes', 'solid', 'points'):
            marks += [Mark(_blob(rng, dx + s, 0.42, 0.22, 0.17), self.accent)
                      for s in (-0.17, 0.17)]
        else:
            marks += [Mark(_blob(rng, dx, 0.45, 0.36, 0.3), self.coat)]
        open_eye = rng.uniform(0.13, 0.2)
        for side in (-0.42, 0.42):
            marks += [Mark(_blob(rng, dx + side, -0.06, 0.24, open_eye + 0.05), DARK),
                      Mark(_blob(rng, dx + side, -0.06, 0.2, open_eye), breed.eye),
                      Mark(_blob(rng, dx + side, -0.06, 0.065, open_eye * 0.95), DARK),
                      Mark(_blob(rng, dx + side + 0.06, -0.12, 0.04, 0.04), (250, 250, 250))]
        nose = PINK if breed.pattern in ('stripes', 'patches') else DARK
        marks.append(Mark(np.array([(dx - 0.12, 0.22), (dx + 0.12, 0.22), (dx, 0.36)]), nose))
        marks.append(Mark(np.array([(dx - 0.2, 0.52), (dx - 0.08, 0.55), (dx, 0.36),
                                    (dx + 0.08, 0.55), (dx + 0.2, 0.52)]), DARK, 0.04))
        whisker = (225, 225, 220) if sum(self.coat) < 300 else (120, 110, 104)
        marks += [Mark(np.array([(dx + s * 0.25, 0.42), (dx + s * 1.1, 0.42 + slope)]), whisker, 0.02)
                  for s in (-1, 1) for slope in (-0.14, 0.02, 0.18)]
        skull = _blob(rng, 0, 0, 0.98, 0.84, breed.fluff)
        skull[:, 0] *= 1 + 0.1 * np.sin(np.pi * np.clip(skull[:, 1], 0, 1))    # cheeks
        self.add(skull, 'head', marks)

    def dog_head(self, turn):
        rng, breed = self.rng, self.breed
        dx, reach = 0.28 * turn, 0.72 * turn * breed.muzzle
        if breed.ears == 'tall':
            self.upright_ears(dx)
        marks = [Mark(_blob(rng, dx + s, -0.36, 0.12, 0.09), self.accent)
                 for s in (-0.33, 0.33) if breed.pattern == 'brows']
        for side in (-0.34, 0.34):
            marks += [Mark(_blob(rng, dx + side, -0.12, 0.17, 0.15), _shade(self.coat, 0.6)),
                      Mark(_blob(rng, dx + side, -0.12, 0.13, 0.13), breed.eye),
                      Mark(_blob(rng, dx + side, -0.12, 0.08, 0.08), DARK),
                      Mark(_blob(rng, dx + side + 0.04, -0.17, 0.035, 0.035), (250, 250, 250))]
        self.add(_blob(rng, 0, 0, 0.8, 0.86, breed.fluff * 0.6), 'head', marks)
        if breed.ears != 'tall':
            drop, wide = (0.55, 0.27) if breed.ears == 'floppy' else (1.05, 0.33)
            for side in (-1, 1):
                self.add(_tube(rng, (side * 0.5, -0.72, 0.14), (side * 1.15, -0.75, wide * 0.7),
                               (side * 0.98, drop, wide * 1.1), fluff=breed.fluff), 'ear',
                         colour=_shade(self.role_colour('ear'), 0.84))
        tip, smile = reach + 0.4 * turn * breed.muzzle, reach + 0.2 * turn
        marks = [Mark(np.array([(smile - 0.3, 0.66), (smile - 0.12, 0.76), (smile, 0.66),
                                (smile + 0.12, 0.76), (smile + 0.3, 0.66)]), DARK, 0.05)]
        if rng.random() < 0.4:
            marks.append(Mark(_blob(rng, smile, 0.86, 0.13, 0.18), (220, 96, 110)))
        marks += [Mark(_blob(rng, tip, 0.34, 0.2, 0.15), DARK),
                  Mark(_blob(rng, tip - 0.05, 0.29, 0.06, 0.03), (120, 112, 112))]
        self.add(_tube(rng, (0.5 * dx, 0.3, 0.4), (reach, 0.45, 0.44), (tip, 0.5, 0.36)),
                 'muzzle', marks)

    def upright_ears(self, dx):
        """Pointed ears, or higher and narrower tall ones."""
        tip, base = (1.42, 0.3) if self.breed.ears == 'tall' else (1.22, 0.36)
        for side in (-1, 1):
            outer = np.array([(side * (0.56 + base) + dx * 0.3, -0.25),
                              (side * 0.86 + dx * 0.3, -tip),
                              (side * (0.56 - base) + dx * 0.3, -0.6)])
            centre = outer.mean(0)
            inner = Mark(centre + 0.55 * (outer - centre), _shade(PINK, 0.85))
            self.add(outer, 'ear', [inner])


# ------------------------------------------------------------------------------------- the poses

def _standing(sketch):
    breed, rng = sketch.breed, sketch.rng
    length, girth, ground = breed.length, breed.girth, breed.legs + 0.35
    step = rng.uniform(-0.35, 0.35, 4)
    up = rng.uniform(-1.6, 0.5)
    sketch.tail((length + 0.3, -0.3), (length + 1.0, -0.3), (length + 1.3, up),
                (length + rng.uniform(0.8, 2.0), up - 0.4))
    sketch.leg((0.35, 0.2), (0.35 + step[0], ground - 0.12), far=True)
    sketch.leg((length - 0.25, 0.2), (length - 0.25 + step[1], ground - 0.12), far=True)
    lift = rng.uniform(1.0, 1.5) if breed.species else rng.uniform(0.75, 1.15)
    head = np.array([-0.8, -lift])
    sketch.neck((0.1, -0.1), head, 0.55)
    sketch.add(_tube(rng, (0.15, 0, girth), (length / 2, 0.15, girth * 0.95),
                     (length, -0.05, girth * 0.9), fluff=breed.fluff), 'body')
    sketch.leg((0.0, 0.2), (step[2], ground))
    sketch.leg((length, 0.15), (length + step[3], ground))
    sketch.head(*head, 0.92, rng.uniform(-1.0, -0.2))


def _sitting(sketch):
    breed, rng = sketch.breed, sketch.rng
    girth, ground = breed.girth, 1.7 + 0.75 * breed.legs
    side = rng.uniform(0.3, 1.2)
    sketch.tail((1.1, ground - 0.4), (2.0, ground), (2.2 + side, ground - 0.2),
                (2.0 + side, ground - rng.uniform(0.2, 1.6)))
    sketch.add(_tube(rng, (0, 0.3, girth * 0.8), (0.2, ground / 2, girth * 1.1),
                     (0.6, ground - girth, girth * 1.3), fluff=breed.fluff), 'body')
    sketch.add(_blob(rng, 1.05, ground - 0.75, 0.85, 0.75, breed.fluff), 'haunch')
    sketch.leg((0.85, ground - 0.4), (0.7, ground))
    sketch.leg((0.25, 1.0), (0.2, ground - 0.05), far=True)
    sketch.leg((-0.35, 1.0), (-0.45, ground))
    sketch.neck((0.0, 0.75), (-0.05, -0.6), girth * 0.85)
    sketch.head(-0.1, -0.55, 1.0, rng.uniform(-0.9, 0.7))


def _lying(sketch):
    breed, rng = sketch.breed, sketch.rng
    length, girth = breed.length * 1.05, breed.girth
    sketch.tail((length + 0.4, 0.4), (length + 1.0, 0.8), (length + rng.uniform(1.2, 2.0), 0.7),
                (length + 1.4, rng.uniform(-0.6, 0.6)))
    sketch.leg((0.3, 0.5), (-0.7 - 0.2 * breed.legs, 0.85), far=True)
    sketch.add(_tube(rng, (0, 0.1, girth * 0.95), (length / 2, 0, girth * 1.05),
                     (length, 0.2, girth * 0.85), fluff=breed.fluff), 'body')
    sketch.add(_blob(rng, length - 0.15, 0.4, 0.8, 0.62, breed.fluff), 'haunch')
    sketch.leg((length - 0.2, 0.75), (length - 0.8, 1.05))
    sketch.leg((0.2, 0.65), (-0.5 - 0.25 * breed.legs, 1.05))
    sketch.neck((0.05, 0.0), (-0.4, -0.8), girth * 0.7)
    sketch.head(-0.5, rng.uniform(-1.0, -0.6), 0.95, rng.uniform(-0.9, 0.5))


def _portrait(sketch):
    breed, rng = sketch.breed, sketch.rng
    lean = rng.uniform(-0.3, 0.5)
    sketch.add(_tube(rng, (lean, 1.3, 0.8), (lean * 1.5, 2.2, 1.3), (lean * 2, 4.5, 1.6),
                     fluff=breed.fluff), 'body')
    sketch.neck((lean, 1.5), (0, 0), 0.72)
    sketch.head(0, 0, 1.15, rng.uniform(-0.8, 0.8))


def _placement(rng, parts, size, portrait):
    """Flip, rotate, scale and move a pet into the picture.

    Returns the matrix (2, 2) and the offset (2,) of `points @ matrix + offset`, in pixels.
    """
    linear = _rotation(rng.uniform(-0.12, 0.12)) * (rng.choice((-1, 1)), 1)
    # A portrait is framed by its head and runs out of the picture; other poses fit as a whole.
    head = np.concatenate([part.points for part in parts if part.head]) @ linear
    whole = np.concatenate([part.points for part in parts]) @ linear
    framed = head if portrait else whole
    low, high = framed.min(0), framed.max(0)
    scale = size * (rng.uniform(0.4, 0.68) if portrait else rng.uniform(0.68, 1.04))
    scale /= (high - low).max()
    free = size - scale * (high - low)
    offset = rng.uniform(0, 1, 2) * free - scale * low
    # The whole head stays in the picture, whatever the rest does.
    offset += np.maximum(0, -(scale * head.min(0) + offset))
    offset -= np.maximum(0, scale * head.max(0) + offset - size)
    return linear * scale, offset


# ----------------------------------------------------------------------------------- the picture

def _background(rng, side, horizon, ground, pet_box):
    """Cluttered room or meadow; `horizon` and `ground` are y in pixels of the picture's `side`."""
    outdoor = rng.random() < 0.5
    wall = (rng.integers(110, 235, 3) if not outdoor else np.array([150, 190, 225]))
    floor = (rng.integers(70, 200, 3) if not outdoor else np.array([92, 132, 60]))
    rows = np.linspace(0.8, 1.15, 64)[:, None, None]
    stripe = np.broadcast_to(_jitter(rng, wall, 0.2) * rows, (64, 1, 3))
    image = Image.fromarray(np.clip(stripe, 0, 255).astype(np.uint8)).resize((side, side))
    draw = ImageDraw.Draw(image)
    floor = _jitter(rng, floor, 0.25)
    draw.rectangle((0, horizon, side, side), floor)

    def colour():
        if rng.random() < 0.5:
            breed = BREEDS[rng.integers(len(BREEDS))]
            return _jitter(rng, (breed.coat, breed.marking, breed.accent)[rng.integers(3)], 0.2)
        return tuple(rng.integers(20, 240, 3).tolist())

    if not outdoor and rng.random() < 0.6:                         # floorboards
        for x in np.arange(rng.uniform(0, 0.2), 1.4, rng.uniform(0.1, 0.22)) * side:
            draw.line((x, horizon, (x - side / 2) * 1.8 + side / 2, side), _shade(floor, 0.8),
                      max(1, side // 128))
    for _ in range(rng.integers(2, 6)):                            # furniture, bushes
        x, width, height = rng.uniform((-0.2, 0.1, 0.1), (1.0, 0.45, 0.5)) * side
        foot = horizon + rng.uniform(0, 0.12) * side
        box = (x, foot - height, x + width, foot)
        fill = colour()
        if outdoor and rng.random() < 0.6:
            draw.ellipse(box, fill)
        else:
            draw.rectangle(box, fill, outline=_shade(fill, 0.7), width=max(1, side // 100))
    for _ in range(rng.integers(2, 6)):                            # balls, cushions, stones
        x, y, rx = rng.uniform((0, 0.3, 0.03), (1, 1, 0.11)) * side
        ry, fill = rx * rng.uniform(0.6, 1.1), colour()
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)
        draw.ellipse((x - rx * 0.6, y - ry * 0.7, x, y - ry * 0.2), _shade(fill, 1.2))
    for _ in range(rng.integers(0, 4)):                            # sticks, ropes, cables
        points = _tube(rng, *(rng.uniform((-0.1, 0.2, 0.006), (1.1, 1.0, 0.03), (3, 3)) * side))
        draw.polygon(points.ravel().tolist(), colour())
    if outdoor:
        greens = [_jitter(rng, floor, 0.35) for _ in range(8)]
        for x, y, lean, tall in rng.uniform((0, 0, -0.03, 0.02), (1, 1, 0.03, 0.1), (110, 4)):
            x, y = x * side, horizon + y * (side - horizon)
            draw.line((x, y, x + lean * side, y - tall * side), greens[int(x + y) % 8],
                      max(1, side // 170))
    if ground is not None:                                         # the pet's shadow
        x0, x1 = pet_box
        thick = 0.035 * side
        draw.ellipse((x0, ground - 1.5 * thick, x1, ground + thick), _shade(floor, 0.6))
    cells = int(rng.choice((12, 32, 96)))
    grain = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    grain = grain.resize((side, side), Image.Resampling.BILINEAR)
    return Image.blend(image, grain, rng.uniform(0.04, 0.2))


class Canvas:
    """Picture, mask and head mask, which one stencil for each part paints together."""

    def __init__(self, image):
        self.image = image
        self.mask = Image.new('L', image.size)
        self.head = Image.new('L', image.size)

    def paint(self, part, linear, offset):
        points = part.points @ linear + offset
        low = np.clip(np.floor(points.min(0)) - 1, 0, self.image.size).astype(int)
        high = np.clip(np.ceil(points.max(0)) + 2, 0, self.image.size).astype(int)
        if (high <= low).any():
            return
        stencil = Image.new('L', tuple((high - low).tolist()))
        outline = (points - low).ravel().tolist()
        ImageDraw.Draw(stencil).polygon(outline, 255)

        tile = Image.new('RGB', stencil.size, part.colour)
        draw = ImageDraw.Draw(tile)
        unit = np.sqrt(abs(np.linalg.det(linear)))
        for mark in part.marks:
            shape = (mark.points @ linear + offset - low).ravel().tolist()
            if mark.width:
                draw.line(shape, mark.colour, max(1, round(mark.width * unit)))
            else:
                draw.polygon(shape, mark.colour)
        # A rim keeps the limbs apart; a black coat needs a lighter one.
        rim = _shade(part.colour, 0.72 if sum(part.colour) > 210 else 1.5)
        draw.line(outline + outline[:2], rim, max(1, round(0.08 * unit)))

        corner = tuple(low.tolist())
        self.image.paste(tile, corner, stencil)
        for mask in (self.mask, self.head) if part.head else (self.mask,):
            mask.paste(255, (*corner, *high.tolist()), stencil)


def _develop(rng, image):
    """Light, blur and sensor noise: the drawn picture as uint8 (H, W, 3)."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.002, 0.004) * image.width))
    light = rng.uniform(0.85, 1.15, (3, 3)) * rng.uniform(0.7, 1.15)
    light = Image.fromarray(light.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    sigma = rng.uniform(1, 8)
    # The noise comes last, since only its amount depends on the size of the picture.
    noise = rng.standard_normal((image.height, image.width, 3), np.float32)
    picture = np.asarray(image, np.float32) * np.asarray(light)[..., None] + sigma * noise
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_pet(index, seed=0, size=256):
    """Draw the pet number `index` of the set that `seed` names.

    index, seed: integers of at least 0. size: side of the square picture, 64 to 512 pixels.
    Returns a `Pet`. The breed is `index % len(BREEDS)`, so that any number of pets is balanced;
    all the rest is random, and decided by (seed, index, size) alone, byte for byte.
    """
    number = index % len(BREEDS)
    breed = BREEDS[number]
    rng, parts, linear, offset, canvas = _scene(breed, index, seed, size)
    for part in parts:
        canvas.paint(part, linear, offset)

    image = _develop(rng, canvas.image.reduce(SUPERSAMPLE))
    mask = np.asarray(canvas.mask.reduce(SUPERSAMPLE)) > 127
    head = canvas.head.reduce(SUPERSAMPLE).point(lambda value: 255 * (value > 127))
    return Pet(image, mask.astype(np.uint8)[..., None], np.array(head.getbbox(), np.float32),
               breed.species, number, f'{breed.name}_{index}')


def draw_background(index, seed=0, size=256):
    """The picture of `draw_pet` with the same arguments, without the pet: (size, size, 3) uint8."""
    rng, *_, canvas = _scene(BREEDS[index % len(BREEDS)], index, seed, size)
    return _develop(rng, canvas.image.reduce(SUPERSAMPLE))


def _scene(breed, index, seed, size):
    """What a pet is drawn from: the generator, its parts and where they go, and the canvas with the background."""
    rng = np.random.default_rng([seed, index])
    sketch = Sketch(breed, rng)
    pose = (_standing, _sitting, _lying, _portrait)[rng.integers(4)]
    pose(sketch)

    side = size * SUPERSAMPLE
    linear, offset = _placement(rng, sketch.parts, side, pose is _portrait)
    points = np.concatenate([part.points for part in sketch.parts]) @ linear + offset
    (left, top), (right, bottom) = points.min(0), points.max(0)
    horizon = np.clip(bottom - rng.uniform(0.1, 0.6) * (bottom - top), 0.2 * side, 0.85 * side)
    ground = None if pose is _portrait else bottom
    canvas = Canvas(_background(rng, side, horizon, ground, (left, right)))
    return rng, sketch.parts, linear, offset, canvas


# ------------------------------------------------------------------------------------- the sheet

def _annotate(pet):
    """The picture with its mask outlined in green, its head boxed in red, and its name."""
    mask = pet.mask[..., 0]
    edge = np.zeros(mask.shape, bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    image = pet.image.copy()
    image[edge] = (0, 255, 0)
    image = Image.fromarray(image)
    draw = ImageDraw.Draw(image)
    xmin, ymin, xmax, ymax = pet.bbox.tolist()
    draw.rectangle((xmin, ymin, xmax - 1, ymax - 1), outline=(255, 0, 0))
    draw.text((3, 2), pet.name, (255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return image


def main(argv=None):
    parser = argparse.ArgumentParser(description='Write a contact sheet of synthetic pets.')
    parser.add_argument('--count', type=int, default=24, help='number of pets (default: 24)')
    parser.add_argument('--out', default='synthetic_pets.png', help='PNG file to write')
    parser.add_argument('--seed', type=int, default=0, help='names the set (default: 0)')
    parser.add_argument('--size', type=int, default=256, help='side of a picture (default: 256)')
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f'--count {args.count}: at least 1')

    columns = min(args.count, len(BREEDS))
    rows = -(-args.count // columns)
    sheet = Image.new('RGB', (columns * args.size, rows * args.size))
    pets = [draw_pet(index, args.seed, args.size) for index in range(args.count)]
    for index, pet in enumerate(pets):
        sheet.paste(_annotate(pet), (index % columns * args.size, index // columns * args.size))
    sheet.save(args.out)
    coverage = np.mean([pet.mask.mean() for pet in pets])
    print(f'{args.out}: {args.count} pets, mean mask coverage {coverage:.0%}')


if __name__ == '__main__':
    main()
