"""recipes.py: the presets, what a field may be, and recipes of older runs in today's fields."""

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
from helpers import SMALL

import augment
from tinycifar.paths import RESULTS
from tinycifar.recipes import RECIPES, Recipe, get_recipe, in_full


def test_baseline_is_the_published_recipe():
    r = RECIPES["baseline"]
    assert (r.epochs, r.batch_size, r.policy) == (50, 128, "reference")
    assert (r.optimizer, r.lr, r.momentum, r.weight_decay, r.decay_all) == (
        "sgd", 0.045, 0.9, 5e-4, True,
    )  # fmt: skip
    assert (r.schedule, r.plateau_factor, r.plateau_patience) == ("plateau", 0.1, 2)
    assert (r.stop_patience, r.min_delta, r.label_smoothing, r.ema) == (6, 1e-4, 0, None)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("epochs", 0, "epochs must be a whole number from 1"),
        ("epochs", 2.5, "epochs must be a whole number"),
        ("epochs", True, "epochs must be a whole number"),
        ("batch_size", 0, "batch_size must be a whole number from 1"),
        ("lr", -0.1, "lr must be a number from"),
        ("lr", "0.1", "lr must be a number from .* got '0.1'"),
        ("lr", math.nan, "lr must be a number"),
        ("momentum", 1.0, "momentum must be"),
        ("weight_decay", -1, "weight_decay must be"),
        ("warmup", 1.0, "warmup must be"),
        ("label_smoothing", 1.0, "label_smoothing must be"),
        ("ema", 1.0, "ema must be a number from 0 to 0.99999 or None"),
        ("stop_patience", 0, "stop_patience must be"),
        ("start_side", 64, "start_side must be a whole number from 8 to 32"),
        ("grow", "half", "grow must be a number from 0 to 1"),
        ("dilated", "False", "dilated must be True or False"),
        ("optimizer", "adam", "unknown optimizer 'adam'; valid: sgd, adamw"),
        ("schedule", "step", "unknown schedule 'step'; valid: plateau, one_cycle"),
        ("precision", "half", "unknown precision 'half'; valid: float32, bfloat16"),
        ("network", 16, "network must be 'tiny', a layout or 'module:Class', as text; got 16"),
        ("build", "numpy", "unknown build 'numpy'; valid: batched, albumentations, torchvision"),
        ("policy", "strong", "(?i)unknown policy 'strong'.*none.*reference"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_range(field, value, says):
    with pytest.raises(ValueError, match=says):
        get_recipe("quick", **{field: value})


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="unknown recipe 'quik'; valid: baseline, quick"):
        get_recipe("quik")
    with pytest.raises(ValueError, match=r"unknown recipe field 'epoch'; valid: .*epochs"):
        get_recipe("quick", epoch=3)


def test_numpys_numbers_are_numbers():
    recipe = get_recipe(SMALL, epochs=np.int64(1), lr=np.float32(0.5), batch_size=np.int32(64))
    assert (recipe.epochs, recipe.lr, recipe.batch_size) == (1, 0.5, 64)
    assert json.loads(json.dumps(asdict(recipe)))["lr"] == 0.5
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        get_recipe(SMALL, epochs=np.float64(1.5))


def test_a_changed_preset_does_not_pass_as_the_preset():
    assert get_recipe("quick", epochs=None, lr=None) == RECIPES["quick"]
    assert get_recipe("quick", epochs=RECIPES["quick"].epochs).name == "quick"
    assert get_recipe("quick", epochs=9, lr=0.2).name == "quick-epochs=9,lr=0.2"


def test_what_may_be_none_can_be_switched_off():
    changed = get_recipe("baseline", schedule="one_cycle", stop_patience=None)
    assert changed.stop_patience is None
    assert changed.name == "baseline-schedule=one_cycle,stop_patience=None"
    averaged = get_recipe("quick", name="averaged", ema=0.9, teacher="tuned")
    plain = get_recipe(averaged, name="plain", ema=None, teacher=None)
    assert plain == get_recipe("quick", name="plain")


def test_a_recipes_name_names_a_folder():
    assert get_recipe(SMALL, teacher="runs/t").name == "small-teacher=runs_t"
    for name in ("a/b", "a\\b", None):
        with pytest.raises(ValueError, match="no slashes"):
            Recipe(name)


def test_alternating_flips_need_a_policy_and_a_build_that_flip():
    with pytest.raises(ValueError, match=r"alternate_flip .*'batched'.*'torchvision'"):
        get_recipe(SMALL, alternate_flip=True, build="torchvision")
    with pytest.raises(ValueError, match="a policy that flips"):
        get_recipe(SMALL, alternate_flip=True, policy="none")


def test_a_policy_or_teacher_that_isnt_a_name_is_refused():
    with pytest.raises(ValueError, match="policy must be the name of one in augment"):
        get_recipe(SMALL, policy=augment.Policy(flip=0.5))
    with pytest.raises(
        ValueError, match="teacher must be a run's name or path, as text, or None; got 3"
    ):
        get_recipe(SMALL, teacher=3)


def test_the_side_of_the_images_grows_in_steps_of_eight():
    recipe = get_recipe(SMALL, epochs=5, start_side=16, grow=0.6)
    assert [recipe.side(epoch) for epoch in range(1, 6)] == [16, 16, 24, 32, 32]
    assert {SMALL.side(epoch) for epoch in range(1, 4)} == {32}
    assert {get_recipe(recipe, grow=0.0).side(epoch) for epoch in range(1, 6)} == {32}
    assert get_recipe("tuned", grow=0.28).side(15) == 32, "0.28 x 50 is 14, but not in floats"


def test_the_options_of_a_network_are_those_it_takes():
    assert RECIPES["quick"].model_options == {"dilated": True, "separable": True, "width": 1.0}
    assert get_recipe("quick", network="8 8d2", skips="all").model_options == {
        "layout": "8 8d2",
        "skips": "all",
        "activation": "relu",
        "attention": "none",
    }
    with pytest.raises(ValueError, match="a layout names the channels"):
        get_recipe("quick", network="eight")


# ------------------------------------------------------------------------------- of older runs

CONFIGS = sorted(RESULTS.rglob("config.json"))
RETIRED = {"whiten": False, "decay_depthwise": 1.0, "calm": 0.0}


def test_published_recipes_read_in_todays_fields():
    assert len(CONFIGS) > 60
    for file in CONFIGS:
        old = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        recipe = in_full(old)
        more = recipe.keys() - {field.name for field in fields(Recipe)}
        assert more == {k for k, v in RETIRED.items() if old.get(k, v) != v}, file
        kept = {k: v for k, v in recipe.items() if k not in more}
        assert asdict(Recipe(**kept)) == kept, file
        assert all(recipe[k] == v for k, v in old.items() if k in recipe), file


def test_what_was_retired_stays_where_it_had_an_effect():
    plain = in_full({"name": "x", "epochs": 7, **RETIRED})
    assert plain == asdict(Recipe("x", epochs=7))
    whitened = in_full({"name": "x", "epochs": 7, **RETIRED, "whiten": True})
    assert whitened == plain | {"whiten": True}, "so that the two are never taken for one"
