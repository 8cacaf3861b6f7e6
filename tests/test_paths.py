"""paths.py: from where a relative path counts, in a checkout and outside of one."""

from pathlib import Path

import pytest

from tinycifar import paths
from tinycifar.paths import CHECKOUT, RESULTS, absolute, shown

in_a_checkout = pytest.mark.skipif(CHECKOUT is None, reason="an installed copy")


@in_a_checkout
@pytest.mark.parametrize("folder", [".", "notebooks", "tinycifar/analysis"])
def test_in_a_checkout_paths_count_from_its_root(monkeypatch, folder):
    monkeypatch.chdir(CHECKOUT / folder)
    assert absolute("runs/mine") == CHECKOUT / "runs" / "mine"
    assert shown(CHECKOUT / "runs" / "mine") == Path("runs/mine")


def test_elsewhere_paths_count_from_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("runs/mine") == tmp_path / "runs" / "mine"
    assert absolute(Path("runs")) == tmp_path / "runs"
    assert shown(tmp_path / "runs") == Path("runs")


def test_an_installed_copy_counts_from_the_working_folder_everywhere(monkeypatch):
    package = Path(paths.__file__).parent
    monkeypatch.setattr(paths, "CHECKOUT", None)
    monkeypatch.chdir(package)
    assert absolute("runs") == package / "runs"


def test_absolute_paths_stay_and_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert absolute(tmp_path / "x") == tmp_path / "x"
    assert absolute("~/x") == tmp_path / "x"


def test_what_lies_elsewhere_is_shown_whole(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shown(tmp_path / "there") == tmp_path / "there"


def test_the_published_runs_are_where_results_says():
    assert (RESULTS / "published.csv").is_file()
    assert (RESULTS / "quick" / "best.pt").is_file()
