"""The command line, and how the Makefile calls it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import NETWORK
from PIL import Image

from tinycifar import studies, training, weights
from tinycifar.__main__ import _arguments, _values, literal, main
from tinycifar.paths import CHECKOUT, RESULTS
from tinycifar.run_directory import RunError

# Nothing in them may be carried out by a shell, or by make.
NAMES = [
    "price $5.jpg",
    'a"b.jpg',
    "it's.jpg",
    "`touch carried_out`.jpg",
    "$(touch carried_out).jpg",
    "$(shell touch carried_out) ${HOME} $$x.jpg",
    "a;b #c\\d & (e).jpg",
]


def fails(arguments, capsys):
    """Exit code, and what is said: one line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert said.endswith("\n") and said.count("\n") == 1
    return end.value.code, said.strip()


def test_help_needs_no_torch():
    script = "import sys; from tinycifar.__main__ import main\ntry: main([])\nfinally: "
    script += "assert not {'torch', 'matplotlib', 'pandas', 'papermill'} & sys.modules.keys()"
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    verbs = "notebook train sweep dashboard predict publish card verify"
    for verb in verbs.split():
        assert f"\n  {verb} " in printed
    assert "\n  worker" not in printed


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["trian"], 2, "error: No such command 'trian'. Did you mean 'train'?"),
        (["train", "--sed", "1"], 2, "error: No such option: --sed"),
        (["predict"], 1, "error: name an image, e.g. make predict IMAGE=cat.jpg"),
        (["train", "--seed", "one"], 1, "error: seed must be a whole number from 0"),
        (["train", "-p", "epoch", "3"], 1, "error: unknown recipe field 'epoch'; valid: name"),
        (
            ["train", "-p", "recipe", "quick"],
            1,
            "error: unknown recipe field 'recipe'; valid: name",
        ),
        (["train", "--run", "tuned"], 1, "error: 'tuned' is the name of a published run"),
        (["train", "-p", "epochs"], 1, "error: -p epochs has no value: give -p NAME VALUE"),
        (["predict", "gone.png"], 1, "error: no image at gone.png"),
        (["predict", "x.png", "--run", "gone"], 1, "error: no run at 'gone': expected"),
        (["sweep", "slow"], 1, "error: unknown recipe 'slow'; valid: baseline, quick"),
        (["sweep", "--study", "gone.yaml"], 1, "error: no study at"),
        (["sweep", "quick", "--study", "x"], 1, "error: a study names its own recipes and seeds"),
        (["dashboard"], 1, "error: name a study, e.g. make dashboard STUDY="),
        (["dashboard", "--study", "studies/gone.yaml"], 1, "error: no study at"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, code, says):
    ended, said = fails(arguments, capsys)
    assert (ended, said[: len(says)]) == (code, says)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-3", 1e-3),
        ("False", False),
        ("false", False),
        ("None", None),
        ("none", "none"),  # a policy
        ("one_cycle", "one_cycle"),
        ("['none', 'light']", ["none", "light"]),
        ('{"alternate_flip": true, "ema": null}', {"alternate_flip": True, "ema": None}),
        ("{{1}}", "{{1}}"),  # Python, but no value of it
    ],
)
def test_values_are_what_they_look_like(text, value):
    assert literal(text) == value


def test_parameters_are_pairs_as_papermill_has_them(monkeypatch):
    monkeypatch.setenv(
        "TINYCIFAR_PARAMS", """-p lr -1 -p changes '{"policy": "a=b"}' -p run_dir=x"""
    )
    assert _arguments(["train", "-p", "epochs", "5"]) == ["train", "-p", "epochs=5"]
    given = _arguments(["notebook", "stats", "-p", "epochs", "5"])
    assert given[:2] == ["notebook", "stats"]
    values = {"epochs": 5, "lr": -1, "changes": {"policy": "a=b"}, "run_dir": "x"}
    assert _values(given[3::2]) == values


def test_unfinished_quotes_are_named(monkeypatch, capsys):
    monkeypatch.setenv("TINYCIFAR_PARAMS", "-p policy 'light")
    code, said = fails(["notebook"], capsys)
    assert code == 1 and said == "error: PARAMS can't be split into words: No closing quotation"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_any_name_is_classified(tmp_path, monkeypatch, capsys, name):
    pixels = np.random.default_rng(0).integers(256, size=(40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.setenv("TINYCIFAR_IMAGE", str(tmp_path / name))
    monkeypatch.setenv("TINYCIFAR_RUN", "")  # the default
    main(["predict", "--top", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[0].endswith("%")


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    """`predict ... | head`."""
    image, onnx = str(tmp_path / "image.png"), str(RESULTS / "export" / "net.onnx")
    Image.new("RGB", (32, 32)).save(image)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tinycifar", "predict", image, "--onnx", onnx]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, by):
    def interrupted(*_):
        signal.raise_signal(by)

    monkeypatch.setattr(weights, "load_pretrained", interrupted)
    said = "interrupted: repeated, a training goes on from its last finished epoch"
    assert fails(["predict", "x.png"], capsys) == (130, said)


SMALL = ["--dataset", "shapes", "--limit", "100", "-p", "epochs", "1", "-p", "network", NETWORK]


def test_train_needs_no_notebook(tmp_path, capsys):
    main(["train", *SMALL, "--run", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    accuracy = f"test accuracy {metrics['test_acc']:.2f} % on shapes (stand-in, NOT CIFAR-10)"
    assert accuracy in capsys.readouterr().out
    main(["train", *SMALL, "--run", str(tmp_path / "run")])
    assert "This run is finished, and kept" in capsys.readouterr().out
    code, said = fails(["train", *SMALL, "--run", str(tmp_path / "run"), "--seed", "1"], capsys)
    assert code == 1 and "seed is 0 there and 1 now" in said


def test_python_that_drops_asserts_and_docstrings_does_the_same(tmp_path):
    """`python -OO`; help was taken from docstrings."""
    image, run = str(tmp_path / "image.png"), str(tmp_path / "run")
    Image.new("RGB", (40, 40)).save(image)
    calls = ["train", *SMALL, "--run", run], ["predict", image, "--run", run, "--top", "10"], []
    script = f"from tinycifar.__main__ import main\nfor call in {calls}: main(call)"
    command = [sys.executable, "-OO", "-c", script]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    for part in ("test accuracy", "%  triangle", "Train a network, without a notebook"):
        assert part in said


@pytest.fixture
def asked(monkeypatch, tiny):
    """What `train_many` and `train_study` are asked for; of a study all but the last is trained."""
    calls = []

    def train_many(recipes, seeds, **more):
        calls.append({"recipes": recipes, "seeds": seeds, **more})
        raise RunError("1 run failed")

    def train_study(study, *, folder, **more):
        for recipe in study.recipes[:-1]:
            run_dir = folder / training.run_name(recipe, "val", study.seeds[0])
            training.train(recipe, run_dir, dataset=tiny, progress=False)
        train_many(study.recipes, study.seeds, folder=folder, **more)

    monkeypatch.setattr(studies, "train_many", train_many)
    monkeypatch.setattr(studies, "train_study", train_study)
    return calls


def test_a_study_ends_with_its_table_though_a_run_failed(asked, tmp_path, capsys):
    study = {
        "about": "Is a higher rate better?",
        "base": "quick",
        "always": {"epochs": 1, "start_side": 32, "network": NETWORK},
        "variations": {"lr 0.1": {"lr": 0.1}, "too high": {"lr": 99}},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(SystemExit):
        main(["sweep", "--study", str(tmp_path / "small.yaml"), "--folder", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert printed.err == "error: 1 run failed\n"
    assert "Is a higher rate better?" in printed.out
    assert "| lr 0.1" in printed.out and "| too high" not in printed.out


def test_a_sweep_without_a_study(asked, monkeypatch, capsys):
    assert fails(["sweep", "quick", "--jobs", "2"], capsys) == (1, "error: 1 run failed")
    monkeypatch.setenv("TINYCIFAR_RECIPES", "tuned")
    monkeypatch.setenv("TINYCIFAR_SEEDS", " 3 4")
    monkeypatch.setenv("TINYCIFAR_PROTOCOL", "full")
    monkeypatch.setenv("TINYCIFAR_STORAGE", "postgresql://u:p@h/d")
    monkeypatch.setenv("TINYCIFAR_THREADS", "2")
    fails(["sweep"], capsys)
    first, second = asked
    assert (first["recipes"], first["seeds"]) == (["quick"], [0, 1, 2])
    assert (first["jobs"], first["folder"], first["protocol"]) == (2, "runs", "val")
    assert (first["storage"], first["threads"]) == (None, 1)
    assert (second["recipes"], second["seeds"]) == (["tuned"], [3, 4])
    assert (second["jobs"], second["protocol"]) == (None, "full")
    assert (second["storage"], second["threads"]) == ("postgresql://u:p@h/d", 2)


# ----------------------------------------------------------------------------------------- make


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that only says how it was called."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable} -IS\n"
        "import json, os, sys\n"
        "given = {k: v for k, v in os.environ.items() if k.startswith('TINYCIFAR_') and v}\n"
        "print(json.dumps([sys.argv[1:], given, os.getppid()]))\n"
    )
    python.chmod(0o755)
    (tmp_path / "venv" / ".ready").touch()

    def make(*arguments, **environment):
        command = ["make", "-s", f"--file={CHECKOUT / 'Makefile'}", f"VENV={tmp_path / 'venv'}"]
        for needed in ("requirements.txt", "constraints.txt", "pyproject.toml"):
            (tmp_path / needed).touch()
        (tmp_path / "venv" / ".ready").touch()
        clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(err)
        print(err, file=sys.stderr)
        called, given, parent = json.loads(out)
        assert parent == process.pid, "a shell between the two would keep a SIGTERM for itself"
        return called, {name.removeprefix("TINYCIFAR_"): value for name, value in given.items()}

    return make


@pytest.mark.parametrize(
    ("target", "verb"),
    [
        ("run-notebook", "notebook"),
        ("stats", "notebook stats"),
        ("train", "notebook training"),
        ("analysis", "notebook analysis"),
        ("tour", "notebook tuning_CNN_CIFAR10"),
        ("predict", "predict"),
        ("sweep", "sweep"),
        ("study", "notebook study"),
        ("dashboard", "dashboard"),
        ("results", "publish"),
        ("card", "card"),
        ("verify-results", "verify"),
    ],
)
def test_a_target_is_one_call(make, target, verb):
    assert make(target) == (["-m", "tinycifar", *verb.split()], {})


@pytest.mark.parametrize("name", NAMES)
def test_settings_arrive_as_they_are(make, tmp_path, name):
    settings = dict.fromkeys(("IMAGE", "RUN", "RECIPE", "STUDY"), name)
    assert make("run-notebook", *map("=".join, settings.items()))[1] == settings
    assert make("run-notebook", **settings)[1] == settings
    exported = {f"TINYCIFAR_{setting}": value for setting, value in settings.items()}
    assert make("run-notebook", **exported)[1] == settings
    assert make("run-notebook", "RUN=other", **exported)[1] == settings | {"RUN": "other"}
    assert not Path(tmp_path, "carried_out").exists()


def test_settings_of_a_run(make):
    settings = {
        "SEED": "1",
        "RUN": "runs/it's",
        "PARAMS": """-p changes '{"lr": 1}'""",
        "NB": "stats",
    }
    assert make("run-notebook", *map("=".join, settings.items()))[1] == settings


def test_a_sweep_refuses_what_it_cannot_use(make):
    assert make("sweep", "RECIPE=tuned", "JOBS=2")[1]["RECIPES"] == "tuned"
    assert make("sweep", "RECIPE=tuned", "RECIPES=quick sprint")[1]["RECIPES"] == "quick sprint"
    with pytest.raises(RuntimeError, match="make sweep takes no SEED: it takes STUDY, or RECIPES"):
        make("sweep", "SEED=1")


@pytest.mark.parametrize("target", ["predict", "export", "study"])
def test_a_setting_that_would_be_ignored_is_refused(make, target):
    with pytest.raises(RuntimeError, match=f"make {target} takes no RECIPE: it takes .*RUN"):
        make(target, "RECIPE=sprint")


def test_a_setting_that_there_is_not_is_named(make, capfd):
    make("train", "EPOCHS=3", "SEED=1", "CIFAR10_ROOT=data")
    (warning,) = filter(None, capfd.readouterr().err.splitlines())
    assert "EPOCHS is no setting here" in warning
    with pytest.raises(RuntimeError, match="VENV must be one word"):
        make("train", "VENV=my env")


def test_the_pins_agree():
    pins = [
        {
            line.split(";")[0].split("#")[0].strip().lower()
            for line in (CHECKOUT / file).read_text().splitlines()
            if "==" in line
        }
        for file in ("requirements.txt", "constraints.txt")
    ]
    assert pins[0] <= pins[1], "run `make lock`"
    assert "://" not in (CHECKOUT / "constraints.txt").read_text()
