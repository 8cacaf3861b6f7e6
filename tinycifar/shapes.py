"""`shapes`, the stand-in for CIFAR-10: ten classes of coloured shapes, drawn by code.

Only + - * / and square roots of random 24-bit fractions, in float32: operations that IEEE 754
rounds alike everywhere, so that every machine draws the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# fmt: off
SHAPES = (
    "disc", "ring", "crescent", "square", "frame", "triangle", "star", "heart", "cross", "bars",
)
# fmt: on

CHUNK = 50  # images drawn at once, a multiple of 10; another number would draw other images

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def draw_shapes(n: int) -> Arrays:
    """Training images and labels, test images and labels: the first n and n // 5 of two streams."""
    return *_stream(1, n), *_stream(2, n // 5)


def _stream(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n images drawn from a seed, and their labels 0 1 .. 9 0 1 .."""
    rng = np.random.Generator(np.random.PCG64(seed))
    images = np.concatenate([_draw(rng) for _ in range(0, n, CHUNK)])
    return images[:n], np.arange(n, dtype=np.int64) % 10


def _draw(rng: np.random.Generator) -> np.ndarray:
    """CHUNK images, uint8 (CHUNK, 32, 32, 3); the classes take turns."""
    clouds = _clouds(rng)
    back = _uniform(rng, 0, 1, 3)
    # Half-way round from the background in every channel, within 0.15: always seen, any hue.
    fore = (back + _uniform(rng, 0.35, 0.65, 3)) % 1
    image = back + 0.5 * clouds

    u, v = _coordinates(rng, count=4, spread=16, smallest=1.5, largest=3.5)
    spots = _coverage(_disc(u, v)).max(axis=1, keepdims=True)  # clutter, behind the shape
    image += spots * (_uniform(rng, 0, 1, 3) - image)

    u, v = _coordinates(rng, count=1, spread=5, smallest=8, largest=13)
    depth = np.empty_like(u)
    for label, inside in enumerate(INSIDE):
        depth[label::10] = inside(u[label::10], v[label::10])
    image += _coverage(depth) * (fore + 0.25 * clouds[:, :, ::-1] - image)

    noise = rng.random(image.shape, np.float32) - rng.random(image.shape, np.float32)
    pixels = np.clip(image + 0.1 * noise, 0, 1) * 255 + 0.5
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def _uniform(rng: np.random.Generator, low: float, high: float, count: int) -> np.ndarray:
    """So many numbers for each image, float32 (CHUNK, count, 1, 1)."""
    return low + (high - low) * rng.random((CHUNK, count, 1, 1), np.float32)


def _clouds(rng: np.random.Generator, cells: int = 3) -> np.ndarray:
    """Soft patches of colour, -0.5..0.5: a coarse grid of random ones, interpolated linearly."""
    knots = rng.random((CHUNK, 3, cells + 1, cells + 1), np.float32) - 0.5
    cell, offset = np.divmod(np.arange(32, dtype=np.float32) * cells / 32, 1)
    cell = cell.astype(int)
    columns = knots[..., cell] * (1 - offset) + knots[..., cell + 1] * offset
    offset = offset[:, None]
    return columns[..., cell, :] * (1 - offset) + columns[..., cell + 1, :] * offset


def _coordinates(
    rng: np.random.Generator, count: int, spread: float, smallest: float, largest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel as seen from a shape of radius 1: moved, turned and scaled at random.

    Two arrays, float32 (CHUNK, count, 32, 32).
    """
    axis = np.arange(32, dtype=np.float32) - 15.5
    x = axis - _uniform(rng, -spread, spread, count)
    y = axis[:, None] - _uniform(rng, -spread, spread, count)
    a, b = _uniform(rng, -1, 1, count), _uniform(rng, -1, 1, count)
    scale = np.sqrt(a * a + b * b) * _uniform(rng, smallest, largest, count)
    return (a * x + b * y) / scale, (a * y - b * x) / scale


def _coverage(depth: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1, from how deep inside it lies: soft edges."""
    return np.clip(10 * depth + 0.5, 0, 1)


# Each gives the depth inside the shape, negative outside, at (u, v) in units of the shape's radius.


def _disc(u: Any, v: Any, radius: float = 0.85) -> Any:
    return radius - np.sqrt(u * u + v * v)


def _ring(u: Any, v: Any) -> Any:
    return 0.2 - abs(_disc(u, v, 0.75))


def _crescent(u: Any, v: Any) -> Any:
    return np.minimum(_disc(u, v, 0.95), -_disc(u - 0.45, v, 0.75))


def _square(u: Any, v: Any, half_side: float = 0.75) -> Any:
    return half_side - np.maximum(abs(u), abs(v))


def _frame(u: Any, v: Any) -> Any:
    return 0.17 - abs(_square(u, v, 0.65))


def _triangle(u: Any, v: Any) -> Any:
    return 0.5 - np.maximum(v, 0.8660254 * abs(u) - 0.5 * v)


def _star(u: Any, v: Any) -> Any:
    """A pentagram: all that lies beyond one at most of the five lines it is made of."""
    normals = [(0.0, -1.0), (0.9510565, -0.309017), (0.5877853, 0.809017)]
    normals += [(-0.9510565, -0.309017), (-0.5877853, 0.809017)]
    return np.sort([0.309017 - x * u - y * v for x, y in normals], axis=0)[1]


def _heart(u: Any, v: Any) -> Any:
    u = abs(u)
    diamond = 0.70710678 * (0.75 - u - abs(v - 0.1))
    return np.maximum(diamond, _disc(u - 0.375, v + 0.275, 0.53033))


def _cross(u: Any, v: Any) -> Any:
    u, v = abs(u), abs(v)
    return np.minimum(0.95 - np.maximum(u, v), 0.27 - np.minimum(u, v))


def _bars(u: Any, v: Any) -> Any:
    return np.minimum(0.85 - abs(u), 0.2 - abs(abs(v) - 0.5))


INSIDE = (_disc, _ring, _crescent, _square, _frame, _triangle, _star, _heart, _cross, _bars)
