"""export.py: the files answer as torch does, say what they are, and nothing else is written."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from helpers import SMALL

from tinycifar import export as exporting
from tinycifar import get_recipe, train
from tinycifar.checks import DataUnavailable
from tinycifar.data import Stats
from tinycifar.evaluation import log_probabilities
from tinycifar.export import FILES, answers, export, int8_network, onnx_model, ort_session, sources
from tinycifar.paths import DEFAULT, RESULTS
from tinycifar.run_directory import PRETRAINED, RunError
from tinycifar.weights import load_pretrained

NET, INT8, TABLE = FILES
# Of so many steps that its BatchNorms know what they see: else all answers are the same.
STEPS = {"batch_size": 4, "start_side": 16}
TINY = get_recipe(SMALL, name="tiny", epochs=1, network="tiny", width=0.25, **STEPS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    """A run of the reference's network, one of another kind, and an int8 one of each."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe in (TINY, get_recipe(SMALL, name="small", epochs=1, skips="all")):
        run = folder / recipe.name
        options = {"dataset": tiny, "progress": False, "compile": False}
        train(recipe, run, **options)
        int8 = get_recipe(recipe, name=f"{recipe.name}-int8", int8=True, teacher=str(run))
        train(int8, folder / int8.name, **options)
    return folder


@pytest.fixture(scope="module")
def exported(runs, tiny):
    """What came out of `tiny`, and its folder."""
    into = runs / "of tiny"
    return export(runs / "tiny", into, dataset=tiny, progress=False), into


def by_torch(model, images):
    return log_probabilities(model, images, Stats(model.mean, model.std)).exp().numpy()


def metadata(file):
    return {prop.key: prop.value for prop in onnx.load(file).metadata_props}


def test_the_float_file_answers_as_torch_does_for_any_number_of_images(exported, runs, tiny):
    _, into = exported
    session = ort_session(into / NET)
    for n in (1, 3, 40):
        images = tiny.test_images[:n]
        given = session.run(["probabilities"], {"images": images})[0]
        assert given.dtype == np.float32 and given.shape == (n, 10)
        expected = by_torch(load_pretrained(runs / "tiny"), images)
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.01, "else there was nothing to compare"


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_int8_network_answers_as_its_simulation(runs, tiny, name):
    """Also one with skip connections; in float it is another network altogether."""
    int8 = load_pretrained(runs / f"{name}-int8")
    model = onnx_model(int8)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == sum("input.high" in k for k in int8.state_dict()) + 1
    given = answers(ort_session(model), tiny.test_images)
    expected = by_torch(int8, tiny.test_images)
    np.testing.assert_allclose(given, expected, rtol=0, atol=2e-3)
    exact = answers(
        ort_session(onnx_model(exporting.folded(load_pretrained(runs / name)))), tiny.test_images
    )
    np.testing.assert_allclose(
        exact, by_torch(load_pretrained(runs / name), tiny.test_images), atol=1e-4
    )
    assert np.abs(given - exact).max() > 1e-5


def test_what_was_measured_is_returned_and_stored(exported, tiny):
    result, into = exported
    assert sorted(file.name for file in into.iterdir()) == sorted(FILES)
    assert json.loads((into / TABLE).read_text()) == json.loads(json.dumps(result))
    for row in result["files"]:
        content = (into / row["file"]).read_bytes()
        assert row["bytes"] == len(content)
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        predicted = answers(ort_session(into / row["file"]), tiny.test_images).argmax(1)
        assert row["percent"] == pytest.approx(100 * (predicted == tiny.test_labels).mean())
        assert row["microseconds"].keys() == {1, 256}
        assert row["file"] in exporting.table(result)
    assert result["files"][0]["agreement"] == 100


def test_a_file_says_what_it_is(exported, tiny):
    _, into = exported
    for name in (NET, INT8):
        model = onnx.load(into / name)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == exporting.OPSET
        known = metadata(into / name)
        assert known["producer"] == "tinycifar" and known["licence"] == "MIT"
        assert known["run"] == "tiny" and known["recipe"] == "tiny"
        assert known["dataset"] == "shapes"
        assert json.loads(known["classes"]) == list(tiny.classes)
        assert len(json.loads(known["mean"])) == len(json.loads(known["std"])) == 3
        accuracy = json.loads(known["accuracy"])
        assert accuracy["measured"].startswith("this file, 40 test images")
        assert not any(
            node.name or node.doc_string or node.metadata_props for node in model.graph.node
        )


def test_an_int8_run_brings_its_teachers_float_file(runs, tiny, tmp_path):
    result = export(runs / "tiny-int8", tmp_path, dataset=tiny, progress=False)
    assert [row["run"] for row in result["files"]] == ["tiny", "tiny-int8"]
    assert metadata(tmp_path / INT8)["recipe"] == "tiny-int8"
    trained, calibrated = (int8_network(runs / name, tiny) for name in ("tiny-int8", "tiny"))
    assert not torch.equal(trained.head.weight, calibrated.head.weight)


def test_an_int8_run_whose_teacher_was_trained_again_is_refused(runs, tiny, tmp_path):
    """Its float file would be of another network."""
    run = tmp_path / "int8"
    shutil.copytree(runs / "tiny-int8", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"teacher_sha256": "0" * 64}))
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["config_sha256"]  # as an early run, which noted none
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RunError, match=r"started from other weights than .* has now"):
        export(run, tmp_path / "into", dataset=tiny)
    assert not (tmp_path / "into").exists()


def test_without_its_images_there_is_a_float_file_alone(runs, tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "tiny", run)
    config = json.loads((run / "config.json").read_text()) | {"dataset": "cifar10", "limit": None}
    config["data_sha256"] = "of CIFAR-10"
    (run / "config.json").write_text(json.dumps(config))
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["config_sha256"]  # as an early run, which noted none
    (run / "metrics.json").write_text(json.dumps(metrics))

    def load(name, limit=None):
        if name == "cifar10":
            raise DataUnavailable("CIFAR-10 isn't here: set CIFAR10_ROOT.")
        return tiny

    monkeypatch.setattr(exporting, "load", load)
    (tmp_path / INT8).write_bytes(b"of another run")
    with pytest.raises(RunError, match=r"net-int8\.onnx is there already, and without the images"):
        export(run, tmp_path)
    assert (tmp_path / INT8).read_bytes() == b"of another run" and not (tmp_path / NET).exists()
    (tmp_path / INT8).unlink()
    result = export(run, tmp_path)
    (row,) = result["files"]
    assert row["percent"] == metrics["test_acc"]
    assert (
        json.loads(metadata(tmp_path / NET)["accuracy"])["measured"] == "by torch, see metrics.json"
    )
    assert result["compared_on"] == tiny.title
    assert not (tmp_path / INT8).exists()
    assert f"{row['percent']:.2f} by torch" in exporting.table(result)
    assert (
        "set CIFAR10_ROOT" in (said := capsys.readouterr().out) and f"{INT8} isn't written" in said
    )


def test_what_cant_be_exported_is_said_and_nothing_is_written(runs, tiny, tmp_path, monkeypatch):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs / "tiny" / "config.json", unfinished)
    into = tmp_path / "into"
    with pytest.raises(RunError, match="isn't finished and tested: finish its run first"):
        export(unfinished, into, dataset=tiny)
    with pytest.raises(FileNotFoundError, match="no run at 'nowhere'"):
        export("nowhere", into, dataset=tiny)
    larger = replace(tiny, test_images=tiny.test_images.repeat(2, axis=1).repeat(2, axis=2))
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, 32, 32, 3\)"):
        export(runs / "tiny", into, dataset=larger)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't write into .*: name a folder that can be written"):
        export(runs / "tiny", tmp_path / "file", dataset=tiny)
    assert not into.exists() or not list(into.iterdir())

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime.*extra `export`"):
        export(runs / "tiny", into, dataset=tiny)


def test_int8_is_calibrated_on_training_images_alone(runs, tiny):
    other = replace(tiny, test_images=np.zeros_like(tiny.test_images))
    one, same = (int8_network(runs / "tiny", d).state_dict() for d in (tiny, other))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_the_published_int8_run_goes_with_its_teacher():
    run, int8 = sources("taught")
    assert (run.path.name, int8.path.name) == ("taught-seed2", "int8-seed0")


def test_what_left_the_test_set_alone_isnt_exported(tiny, tmp_path):
    train(SMALL, tmp_path / "r", dataset=tiny, progress=False, test=False)
    int8 = get_recipe(SMALL, int8=True, teacher=str(tmp_path / "r"), epochs=1)
    train(int8, tmp_path / "q", dataset=tiny, progress=False)
    for name in "rq":
        with pytest.raises(RunError, match="r isn't finished and tested"):
            export(tmp_path / name, tmp_path / "out")


def test_a_file_that_answers_otherwise_is_refused(runs, tiny, tmp_path, monkeypatch):
    off_by = lambda session, images: answers(session, images) + 2e-4  # noqa: E731
    monkeypatch.setattr(exporting, "answers", off_by)
    with pytest.raises(
        RunError, match=r"differ from torch's by up to 2\.0e-04.*nothing was written"
    ):
        export(runs / "tiny", tmp_path, dataset=tiny)
    assert not list(tmp_path.iterdir())


def test_only_a_global_pool_becomes_a_mean():
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.AdaptiveAvgPool2d(1))
    kinds = [type(module).__name__ for module in exporting._with_onnx_modules(net)]
    assert kinds == ["AdaptiveAvgPool2d", "_Mean"]


def test_in_turns_each_call_has_as_many():
    calls = []
    times = exporting.in_turns({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=2, repeat=2)
    assert "".join(calls) == "aabb" * 3 and times.keys() == {"a", "b"}


def test_times_are_of_one_image(tiny, monkeypatch):
    half_a_second = lambda calls, rounds, repeat: dict.fromkeys(calls, 0.512)  # noqa: E731
    monkeypatch.setattr(exporting, "in_turns", half_a_second)
    times = exporting.in_turns_by_batch({"a": SimpleNamespace(run=print)}, tiny.test_images)
    assert times == {"a": {1: pytest.approx(512_000), 256: pytest.approx(2_000)}}


def test_the_published_files_are_small_and_as_accurate_as_they_say():
    result = json.loads((RESULTS / "export" / TABLE).read_text())
    exact, int8 = result["files"]
    for row, most in ((exact, 165_000), (int8, 80_000)):
        content = (RESULTS / "export" / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert len(content) == row["bytes"] <= most
        known = metadata(RESULTS / "export" / row["file"])
        assert json.loads(known["accuracy"])["percent"] == row["percent"]
        assert known["run"] == row["run"]
    assert exact["run"] == PRETRAINED[DEFAULT] and exact["percent"] - int8["percent"] <= 0.3
