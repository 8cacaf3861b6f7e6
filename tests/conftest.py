"""What several test files share."""

import os
import random
import signal
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # see the Makefile

import matplotlib
import numpy as np
import pytest
import torch

from tinycifar import data, training
from tinycifar.paths import CHECKOUT
from tinycifar.run_directory import RunDirectory

for name in [name for name in os.environ if name.startswith("TINYCIFAR_")]:  # options of commands
    del os.environ[name]
# A shell script that runs the tests in the background has it ignored, by them and what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
matplotlib.use("Agg")  # not by MPLBACKEND: the notebooks' kernels would inherit that


@pytest.fixture(scope="session", autouse=True)
def _leave_the_users_files_alone():
    """Tests read published runs, and write only to folders of their own."""
    before = _users_files()
    yield
    changed = sorted({name for name, _ in before.items() ^ _users_files().items()})
    assert not changed, f"changed while the tests ran, by one of them or by other work: {changed}"


def _users_files():
    """Sizes and times of change."""
    folders = ("data", "notebooks", "results", "runs", "studies")
    files = [file for name in folders for file in (CHECKOUT / name).rglob("*")]
    stats = {str(file.relative_to(CHECKOUT)): file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture(autouse=True)
def _leave_the_users_runs_alone(monkeypatch):
    """No test depends on what a user has in runs/, be it there or not: the guided tour, say."""
    begin = RunDirectory.__init__

    def begin_elsewhere(self, path):
        users = CHECKOUT is not None and (CHECKOUT / "runs") in Path(path).parents
        assert not users, f"a test looks at {path}: give it a folder of its own"
        begin(self, path)

    monkeypatch.setattr(RunDirectory, "__init__", begin_elsewhere)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Also where there is a GPU: tests compare bits, and with what is computed here on the CPU."""
    pick = training.pick_device
    auto = lambda name="auto": pick("cpu" if name == "auto" else name)  # noqa: E731
    monkeypatch.setattr(training, "pick_device", auto)


@pytest.fixture(autouse=True)
def _the_same_numbers_every_time():
    """A test that draws numbers passes or fails, but never now and then."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """As workers have, for the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """A handful of stand-in images: enough to run everything, too few to learn from."""
    return data.load("shapes", limit=200)


@pytest.fixture(scope="session")
def real():
    """CIFAR-10 itself, where it can be found; tests on it are skipped where it can't."""
    from tinycifar.cifar10 import data_root

    root = data_root()
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip("CIFAR-10 isn't here (CIFAR10_ROOT or ./data)")
    return data.load("cifar10")
