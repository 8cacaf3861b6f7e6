"""The three builds of a policy agree: exactly where nothing is random, in distribution elsewhere.

What a build did is read off its outputs, alike for all three: it is fed an image whose red and
green are the pixel's coordinates and whose blue is constant. A least-squares fit to red and green
then gives the affine map, the sign of its determinant the flip, and blue shows holes and borders.
"""

import os
import pickle
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

import augment
from augment import BUILDS, POLICIES, Batched, Policy, get_policy, per_sample

MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)
FILL = np.array([125, 123, 114])  # the mean in whole grey levels
SAMPLERS = BUILDS[1:]
DRAWS = 2000
SIZES = [(32, 32), (30, 44)]  # square and not
UNLIKELY = 1e-3  # p-values below this fail; seeds are fixed, so a test that passes keeps passing

every_build = pytest.mark.parametrize("build", BUILDS)
every_sampler = pytest.mark.parametrize("build", SAMPLERS)
every_size = pytest.mark.parametrize("size", SIZES)


def noise(height=32, width=32, count=None, seed=0):
    shape = (height, width, 3) if count is None else (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def coordinates(height, width, blue):
    y, x = np.mgrid[:height, :width]
    steps = 255 // np.array([width, height])
    return np.stack([x * steps[0], y * steps[1], np.full_like(x, blue)], axis=2).astype(np.uint8)


def normalised(images):
    """Independent of the module: (..., H, W, 3) to (..., 3, H, W)."""
    return np.moveaxis((images / 255 - np.array(MEAN)) / np.array(STD), -1, -3)


def augmented(policy, build, image, count):
    """`count` augmentations of one image as the network gets them, float32 (count, 3, H, W)."""
    if build == "batched":
        images = torch.from_numpy(image).expand(count, *image.shape)
        return Batched(policy, MEAN, STD)(images, torch.Generator().manual_seed(1))
    apply = per_sample(policy, MEAN, STD, build)
    return torch.stack([apply(image, seed) for seed in range(count)])


def grey_levels(policy, build, image, count):
    """The same in grey levels 0..255, float64 (count, H, W, 3)."""
    images = augmented(policy, build, image, count).double().numpy()
    return (np.moveaxis(images, 1, 3) * np.array(STD) + np.array(MEAN)) * 255


# ---- exactly, where nothing is random ----


@every_build
@every_size
@pytest.mark.parametrize(
    "policy",
    [
        "none",
        Policy(rotate=10, affine_p=0),
        Policy(hole=8, hole_p=0),
        Policy(scale=0.1, affine_p=0),
    ],
)
def test_a_policy_that_does_nothing_only_normalises(build, size, policy):
    image = noise(*size)
    got = augmented(policy, build, image, 3)
    assert got.dtype == torch.float32 and type(got) is torch.Tensor
    np.testing.assert_allclose(got, np.stack([normalised(image)] * 3), rtol=0, atol=1e-5)


@every_build
@every_size
def test_certain_flip(build, size):
    image = noise(*size)
    got = augmented(Policy(flip=1.0), build, image, 2)
    np.testing.assert_allclose(got, np.stack([normalised(image[:, ::-1])] * 2), rtol=0, atol=1e-5)


@every_build
@pytest.mark.parametrize("fill, levels", [("mean", FILL), ((0, 128, 255), (0, 128, 255))])
def test_a_hole_as_large_as_the_image(build, fill, levels):
    got = augmented(Policy(hole=32, hole_p=1.0, fill=fill), build, noise(), 2)
    expected = normalised(np.broadcast_to(np.array(levels), (2, 32, 32, 3)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


# ---- in distribution ----


@cache
def crops(name, build, size, count):
    """Offsets and flips of a policy of crops and flips, after checking every single pixel."""
    policy, image = get_policy(name), coordinates(*size, blue=200)
    height, width = size
    mode = "constant" if policy.border == "constant" else "reflect"
    padding = policy.crop_padding
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    windows = {
        window[:, ::step].tobytes(): (top, left, step < 0)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for window in [padded[top : top + height, left : left + width]]
        for step in (1, -1)
    }
    got = grey_levels(policy, build, image, count)
    np.testing.assert_allclose(got, got.round(), atol=1e-3)  # whole grey levels
    return np.array([windows[g.tobytes()] for g in got.round().astype(np.uint8)]).T


@every_build
@pytest.mark.parametrize("name", ["crop_flip", "light"])
def test_crops_and_flips(name, build):
    top, left, flip = crops(name, build, (32, 32), DRAWS)
    assert stats.binomtest(int(flip.sum()), DRAWS, 0.5).pvalue > UNLIKELY
    for offset in (top, left):
        assert stats.chisquare(np.bincount(offset, minlength=9)).pvalue > UNLIKELY
        assert stats.chi2_contingency(table(offset, flip)).pvalue > UNLIKELY
    assert stats.chi2_contingency(table(top, left)).pvalue > UNLIKELY


@every_build
@pytest.mark.parametrize("name", ["crop_flip", "light"])
def test_crops_of_oblong_images(name, build):
    top, left, _ = crops(name, build, (30, 44), 100)
    assert (top.min(), top.max(), left.min(), left.max()) == (0, 8, 0, 8)


def table(a, b):
    """How often each pair of whole numbers came up."""
    counts = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(counts, (a, b), 1)
    return counts


@cache
def warps(policy, build, size):
    """All that happened in many draws, see `measure`."""
    count = DRAWS if size == (32, 32) else DRAWS // 4
    return measure(grey_levels(policy, build, coordinates(*size, blue=0), count), size)


def measure(images, size):
    """Read flip, scale, angle (degrees), shift (pixels: x, y) and hole off coordinate images."""
    height, width = size
    plain = coordinates(height, width, blue=0)[..., :2]
    hole = images[..., 2] > FILL[2] / 2
    # Where a warp of a few pixels, 10 % and 45 degrees still reads from inside the image.
    reach = min(size) * 0.3
    position = np.mgrid[:height, :width] - np.array([[[height - 1]], [[width - 1]]]) / 2
    y, x = position
    central = (abs(x) <= reach) & (abs(y) <= reach)
    design = np.stack([x, y, np.ones_like(x)], axis=2)[central]
    weight = ~hole[:, central]
    centre = (np.array([width, height]) - 1) / 2
    source = images[:, central, :2] / (255 // np.array([width, height])) - centre
    moments = np.einsum("np,pi,pj->nij", weight, design, design)
    linear = np.linalg.solve(moments, np.einsum("np,pi,npk->nik", weight, design, source))
    linear, offset = linear[:, :2].swapaxes(1, 2), linear[:, 2]
    flip = np.linalg.det(linear) < 0
    mirror = np.where(flip[:, None], [-1, 1], [1, 1])
    linear, offset = linear * mirror[:, :, None], offset * mirror
    unwarped = np.where(flip[:, None, None, None], plain[:, ::-1], plain)
    kept = (abs(images[..., :2] - unwarped) < 1e-3).all(axis=3) | hole
    return SimpleNamespace(
        images=images,
        flip=flip,
        scale=np.linalg.det(linear) ** -0.5,
        angle=np.degrees(np.arctan2(linear[:, 0, 1], linear[:, 0, 0])),
        shift=-np.linalg.solve(linear, offset[..., None])[..., 0],
        linear=linear,
        warped=~kept.all(axis=(1, 2)),
        hole=hole,
        cut=hole.any(axis=(1, 2)),
    )


def uniform(values, limit):
    """p-value of values being uniform in -limit .. limit."""
    assert abs(values).max() < 1.03 * limit
    return stats.kstest(values, stats.uniform(-limit, 2 * limit).cdf).pvalue


@every_build
@every_size
def test_how_often_each_thing_happens(build, size):
    seen = warps("reference", build, size)
    for happened, p in ((seen.flip, 0.5), (seen.warped, 0.7), (seen.cut, 0.5)):
        assert stats.binomtest(int(happened.sum()), len(happened), p).pvalue > UNLIKELY


@every_build
@every_size
def test_distribution_of_angles_scales_and_shifts(build, size):
    seen = warps("reference", build, size)
    assert uniform(seen.angle[seen.warped], 10) > UNLIKELY
    assert uniform(seen.scale[seen.warped] - 1, 0.10) > UNLIKELY
    assert uniform(seen.shift[seen.warped, 0], 0.0625 * size[1]) > UNLIKELY
    assert uniform(seen.shift[seen.warped, 1], 0.0625 * size[0]) > UNLIKELY


@every_build
@every_size
def test_holes(build, size):
    seen = warps("reference", build, size)
    holes, images = seen.hole[seen.cut], seen.images[seen.cut]
    for axis, side in ((2, size[0]), (1, size[1])):
        profile = holes.any(axis=axis)
        assert (profile.sum(axis=1) == 16).all()
        start = profile.argmax(axis=1)
        assert stats.chisquare(np.bincount(start, minlength=side - 15)).pvalue > UNLIKELY
    assert (holes.sum(axis=(1, 2)) == 16 * 16).all()
    np.testing.assert_allclose(images[holes], np.broadcast_to(FILL, images[holes].shape), atol=1e-3)


@every_build
def test_a_hole_comes_after_the_crop_so_that_its_border_has_one_too(build):
    policy = Policy(crop_padding=8, border="constant", hole=8, hole_p=1.0, fill=(255, 0, 255))
    red, green, _ = grey_levels(policy, build, np.zeros((32, 32, 3), np.uint8), 200).T.round()
    assert ((red == 255) & (green == 0)).sum((0, 1)).tolist() == [64] * 200


@every_build
def test_everything_is_independent(build):
    """Steps that share a seed, as albumentations' `set_random_seed` makes them, are not."""
    seen = warps("reference", build, (32, 32))
    for a, b in ((seen.flip, seen.warped), (seen.flip, seen.cut), (seen.warped, seen.cut)):
        assert stats.chi2_contingency(table(a.astype(int), b.astype(int))).pvalue > UNLIKELY
    both = seen.warped & seen.cut
    amounts = np.column_stack(
        [
            seen.flip,
            seen.angle,
            seen.scale,
            seen.shift,
            seen.hole.any(axis=2).argmax(axis=1),
            seen.hole.any(axis=1).argmax(axis=1),
        ]
    )[both]
    pvalues = stats.spearmanr(amounts).pvalue[np.triu_indices(amounts.shape[1], 1)]
    assert pvalues.min() > UNLIKELY / 10  # 21 pairs


@every_build
def test_scale_and_rotation_keep_the_centre(build):
    policy, image = Policy(scale=0.1, rotate=45, border="constant"), coordinates(32, 32, blue=0)
    seen = measure(grey_levels(policy, build, image, 300), (32, 32))
    assert abs(seen.shift).max() < 0.03
    assert uniform(seen.angle, 45) > UNLIKELY


@every_build
@every_size
@pytest.mark.parametrize("border, mode", [("reflect_101", "mirror"), ("constant", "grid-constant")])
def test_every_pixel_of_a_warp(build, size, border, mode):
    """Border included, against SciPy's warp with the parameters read off the middle."""
    policy = Policy(shift=0.0625, scale=0.1, rotate=10, border=border)
    image = coordinates(*size, blue=0)
    seen = measure(grey_levels(policy, build, image, 50), size)
    centre = (np.array(size) - 1) / 2
    for got, linear, shift in zip(seen.images, seen.linear, seen.shift, strict=True):
        matrix = linear[::-1, ::-1]  # (y, x) as SciPy has it
        offset = centre - matrix @ (centre + shift[::-1])
        for channel in (0, 1):
            expected = ndimage.affine_transform(
                image[..., channel].astype(float), matrix, offset, order=1, mode=mode
            )
            error = abs(got[..., channel] - expected)
            # Grey levels that are rounded alike all over an image put the fit off by up to a tenth
            # of a pixel: next to nothing inside, but much where bright meets the black border.
            assert error.mean() < 1.0
            assert error.max() < (1.5 if border == "reflect_101" else 32)


@every_build
def test_border_of_a_pure_shift(build):
    """reflect-101 is NumPy's "reflect"."""
    image = coordinates(32, 32, blue=0)
    seen = measure(grey_levels(Policy(shift=0.125), build, image, 50), (32, 32))
    padded = np.pad(image.astype(float), ((6, 6), (6, 6), (0, 0)), mode="reflect")
    for got, shift in zip(seen.images, seen.shift, strict=True):
        whole, part = np.divmod(6 - shift, 1)
        (left, top), (u, v) = whole.astype(int), part
        corner = padded[top : top + 33, left : left + 33]
        rows = (1 - v) * corner[:-1] + v * corner[1:]
        expected = (1 - u) * rows[:, :-1] + u * rows[:, 1:]
        assert abs(got - expected)[..., :2].max() < 1.0


def test_mean_images_agree():
    y, x = np.mgrid[:32, :32] / 31
    smooth = [np.sin(5 * x + 2 * y), np.cos(7 * y - x), np.sin(9 * x * y)]
    image = (127 + 120 * np.stack(smooth, axis=2)).astype(np.uint8)
    image[8:16, 12:26] = (250, 20, 90)
    outputs = [grey_levels("reference", build, image, 1000) for build in BUILDS]
    means = [images.mean(axis=0) for images in outputs]
    errors = [images.var(axis=0) / 1000 for images in outputs]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        z = (means[a] - means[b]) / np.sqrt(errors[a] + errors[b])
        assert abs(z).max() < 5
        assert 0.5 < z.std() < 1.5


# ---- seeds ----


@every_sampler
def test_a_seed_says_it_all(build):
    image, apply = noise(), per_sample("reference", MEAN, STD, build)
    first = [apply(image, seed) for seed in range(8)]
    again = [apply(image, seed) for seed in reversed(range(8))][::-1]
    sent = pickle.loads(pickle.dumps(apply))  # as to a spawned worker
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, sent(image, np.int64(seed))) for seed, a in enumerate(first))
    assert not all(torch.equal(first[0], other) for other in first[1:])
    # The high bits of a seed count as well: (epoch << 32) + index is a seed to be expected.
    assert not all(torch.equal(a, apply(image, seed + (3 << 32))) for seed, a in enumerate(first))


@every_sampler
def test_per_sample_changes_no_global_random_state(build):
    apply = per_sample("reference", MEAN, STD, build)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    apply(noise(), 5)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))


def test_batched_depends_on_its_generator_alone():
    images, module = torch.from_numpy(noise(count=16)), Batched("reference", MEAN, STD)
    state = torch.get_rng_state()
    first = module(images, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(first, module(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, module(images, torch.Generator().manual_seed(4)))
    torch.manual_seed(3)
    assert torch.equal(first, module(images))


def test_batched_treats_each_image_by_itself():
    images, module = torch.from_numpy(noise(count=16)), Batched("reference", MEAN, STD)
    draws = module.draw(16, torch.Generator().manual_seed(0))
    whole = module.transform(images, draws)
    alone = [module.transform(images[i : i + 1], draws[i : i + 1]) for i in range(16)]
    assert torch.equal(whole, torch.cat(alone))


def test_batched_draws_as_much_for_every_policy():
    states = set()
    for name in POLICIES:
        generator = torch.Generator().manual_seed(0)
        Batched(name, MEAN, STD)(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), generator)
        states.add(generator.get_state().numpy().tobytes())
    assert len(states) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_batched_output(name):
    images = torch.from_numpy(noise(count=8))
    before, module = images.clone(), Batched(name, MEAN, STD)
    got = module(images)
    assert got.shape == (8, 3, 32, 32) and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert not module.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", POLICIES)
def test_batched_is_alike_on_a_gpu_and_never_waits_for_it(name):
    images, module = torch.from_numpy(noise(count=64)), Batched(name, MEAN, STD)
    here = module(images, torch.Generator().manual_seed(0))
    draws = module.draw(len(images), torch.Generator().manual_seed(0)).cuda()
    images, module = images.cuda(), module.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = module.transform(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)


# ---- libraries ----


def test_batched_needs_neither_albumentations_nor_torchvision():
    program = """if True:
        import sys
        sys.modules["albumentations"] = sys.modules["torchvision"] = None  # cannot be imported
        import augment, torch
        images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        augment.Batched("reference", (0.5,) * 3, (0.2,) * 3)(images)
        try:
            augment.per_sample("reference", (0.5,) * 3, (0.2,) * 3, "albumentations")
        except ImportError as error:
            print(error)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(augment.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "needs albumentations" in done.stdout and "requirements.txt" in done.stdout


@every_sampler
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", POLICIES)
def test_libraries_do_not_warn(name, build):
    per_sample(name, MEAN, STD, build)(noise(), 0)


def test_pipelines_print_their_steps():
    assert "ShiftScaleRotate" in str(augment.albumentations_transform("reference", MEAN, STD))
    assert "warp_one" in str(augment.torchvision_transform("reference", MEAN, STD))
    assert "rotate=10.0" in str(Batched("reference", MEAN, STD))


def test_torchvision_takes_pil_images_and_tensors():
    from PIL import Image

    image, transform = noise(), augment.torchvision_transform("none", MEAN, STD)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    assert torch.equal(transform(image), transform(tensor))
    assert torch.equal(transform(image), transform(Image.fromarray(image)))


# ---- bad input ----


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("flip", 1.5, "flip must be a number from 0 to 1; got 1.5"),
        ("flip", True, "flip must be a number from 0 to 1; got True"),
        ("flip", float("nan"), "flip must be a number from 0 to 1; got nan"),
        ("crop_padding", -1, "crop_padding must be a whole number of 0 or more; got -1"),
        ("crop_padding", 4.0, "crop_padding must be a whole number of 0 or more; got 4.0"),
        ("shift", -0.1, "shift must be a number from 0 to 1; got -0.1"),
        ("scale", 1.0, "scale must be a number from 0 to 0.99; got 1.0"),
        ("rotate", "10", "rotate must be a number from 0 to 180; got '10'"),
        ("rotate", 181, "rotate must be a number from 0 to 180; got 181"),
        ("affine_p", None, "affine_p must be a number from 0 to 1; got None"),
        ("border", "wrap", "unknown border 'wrap'; valid: reflect_101, constant"),
        ("hole", -16, "hole must be a whole number of 0 or more; got -16"),
        ("hole_p", 2, "hole_p must be a number from 0 to 1; got 2"),
        ("fill", "black", "fill must be 'mean' or three whole numbers from 0 to 255; got 'black'"),
        ("fill", (0, 0), "fill must be 'mean' or three whole numbers from 0 to 255; got (0, 0)"),
        ("fill", (0.5, 0, 0), "fill must be 'mean' or three whole numbers from 0 to 255"),
        ("fill", (0, 0, 256), "fill must be 'mean' or three whole numbers from 0 to 255"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Policy(**{field: value})


def test_a_policy_from_json_is_the_same():
    assert Policy(fill=[1, 2, 3]) == Policy(fill=(1, 2, 3))
    assert hash(Policy(fill=[1, 2, 3])) == hash(Policy(fill=(1, 2, 3)))


@pytest.mark.parametrize("name", ["heavy", "", None, 3, ["none"]])
def test_unknown_policies(name):
    with pytest.raises(ValueError, match=f"unknown policy .*valid: {', '.join(POLICIES)}$"):
        get_policy(name)


@pytest.mark.parametrize("build", ["batched", "kornia", None])
def test_unknown_per_sample_builds(build):
    with pytest.raises(ValueError, match="albumentations, torchvision"):
        per_sample("none", MEAN, STD, build)


@pytest.mark.parametrize("make", [Batched, *(f for f, _ in augment._SAMPLERS.values())])
@pytest.mark.parametrize(
    "mean, std, message",
    [
        ((125.3, 123.0, 113.9), STD, "mean must be three numbers of pixels scaled to 0..1"),
        ((0.5, 0.5), STD, "mean must be three numbers"),
        (0.5, STD, "mean must be three numbers"),
        (MEAN, (0.2, 0.0, 0.2), "std must be three numbers"),
        (MEAN, (0.2, float("nan"), 0.2), "std must be three numbers"),
        (MEAN, "abc", "std must be three numbers"),
    ],
)
def test_bad_statistics(make, mean, std, message):
    with pytest.raises(ValueError, match=message):
        make("none", mean, std)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(8, 32, 32, 3), "uint8 images of shape (N, H, W, 3), got float32 of shape"),
        (torch.zeros(8, 3, 32, 32, dtype=torch.uint8), "got uint8 of shape (8, 3, 32, 32)"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), "got uint8 of shape (32, 32, 3)"),
        (torch.zeros(8, 15, 32, 3, dtype=torch.uint8), "hole of 16 pixels does not fit into"),
        (np.zeros((8, 32, 32, 3), np.uint8), "Expected a tensor of images, got ndarray"),
    ],
)
def test_bad_batches(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Batched("reference", MEAN, STD)(images)


@every_sampler
@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((32, 32, 3), np.float32), "Expected uint8 images of shape"),
        (np.zeros((32, 32, 1), np.uint8), "Expected uint8 images of shape"),
        (np.zeros((3, 32, 32), np.uint8), "Expected uint8 images of shape"),
        (
            np.zeros((15, 32, 3), np.uint8),
            "hole of 16 pixels does not fit into an image of 15 x 32",
        ),
    ],
)
def test_bad_images(build, image, message):
    with pytest.raises(ValueError, match=message):
        per_sample("reference", MEAN, STD, build)(image, 0)


@every_build
def test_images_too_small_for_a_reflected_crop(build):
    with pytest.raises(ValueError, match="Cannot reflect 4 pixels beyond an image of 4 x 9"):
        augmented("light", build, noise(4, 9), 1)


def test_warps_that_torchvision_cannot_reflect():
    policy = Policy(shift=0.5, scale=0.5, rotate=45)
    with pytest.raises(ValueError, match="torchvision build cannot reflect"):
        augmented(policy, "torchvision", noise(), 1)
    for build in ("batched", "albumentations"):
        assert augmented(policy, build, noise(), 1).isfinite().all()


@every_sampler
@pytest.mark.parametrize("seed", [-1, 1.0, "7", None])
def test_bad_seeds(build, seed):
    message = f"seed must be a whole number of 0 or more; got {seed!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        per_sample("none", MEAN, STD, build)(noise(), seed)


@pytest.mark.parametrize("shape", [(1, 11), (4, 10)])
def test_bad_draws(shape):
    images = torch.from_numpy(noise(count=4))
    with pytest.raises(ValueError, match=re.escape(f"of shape (4, 11), got {shape}")):
        Batched("reference", MEAN, STD).transform(images, torch.zeros(shape))
