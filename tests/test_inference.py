"""inference.py: ONNX Runtime gives what torch gives, without torch; one image, and thousands."""

import csv
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tinycifar.__main__ import main
from tinycifar.inference import classify, image_files, likeliest, load_onnx, write_csv
from tinycifar.paths import RESULTS
from tinycifar.weights import TorchNetwork, load_pretrained, predict

NET = RESULTS / "export" / "net.onnx"


@pytest.fixture(scope="module")
def network():
    return load_onnx(NET)


@pytest.fixture
def folder(tmp_path):
    """Seven images, two of them in a folder below, two files that can't be read, and a text."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("a, b.png", 'c"d.JPG', "e\nf.webp", "g.png", "h.bmp", "more/i.png", "more/j.gif"):
        pixels = rng.integers(256, size=(40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "more" / "empty.png").touch()
    (tmp_path / "photos" / "notes.txt").write_text("no image, and not called one")
    return tmp_path / "photos"


def test_it_gives_what_torch_gives(network, tiny):
    model = load_pretrained(network.metadata["run"])
    probabilities = network(tiny.test_images)
    assert probabilities.dtype == np.float32
    expected = TorchNetwork(model)(tiny.test_images)
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert network.classes == tuple(model.classes)


def test_torch_is_not_imported(folder):
    script = "import sys; from tinycifar.__main__ import main; main(sys.argv[1:]); "
    script += (
        "print({'torch', 'torchvision', 'pandas', 'scipy', 'matplotlib'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", script, "predict", folder / "g.png", "--onnx", NET]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.endswith("set()\n")


def test_one_image_reads_the_same_with_either(folder, capsys):
    answers = []
    for network in (["--onnx", str(NET)], []):
        main(["predict", str(folder / "g.png"), "--top", "3", *network])
        lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
        answers.append({name: float(percent) for percent, name in lines})
    assert answers[0] == pytest.approx(answers[1], abs=0.02) and len(answers[0]) == 3


def test_a_folder_becomes_a_table_without_what_cannot_be_read(network, folder):
    files, table = image_files(folder), io.StringIO()
    assert len(files) == 9
    assert write_csv(files, network, table, batch_size=2) == 2  # bad.jpg and a batch of none
    rows = list(csv.DictReader(io.StringIO(table.getvalue())))
    assert [row["path"] for row in rows] == [
        str(file) for file in files if file.name not in ("bad.jpg", "empty.png")
    ]
    for row in rows:
        probabilities = {name: float(row[name]) for name in network.classes}
        assert probabilities[row["class"]] == max(probabilities.values())
        assert probabilities[row["class"]] == float(row["probability"])
        alone = dict(classify([row["path"]], network))[row["path"]]
        np.testing.assert_allclose(list(probabilities.values()), alone, atol=1e-5)


@pytest.mark.parametrize("onnx", [["--onnx", str(NET)], []], ids=["onnx", "torch"])
def test_what_is_skipped_is_named_and_counted(folder, capsys, tmp_path, onnx):
    table = tmp_path / "table.csv"
    gone = str(folder / "gone.png")
    with pytest.raises(SystemExit) as end:
        main(["predict", str(folder), gone, "--csv", str(table), *onnx])
    assert end.value.code == 1
    *skipped, last = capsys.readouterr().err.splitlines()
    assert last == "error: 3 of 10 images could not be read: skipped"
    for line, name in zip(skipped, ("bad.jpg", "empty.png", "gone.png"), strict=True):
        assert line.startswith("skipped: ") and name in line
    assert len(list(csv.reader(table.read_text().splitlines(keepends=True)))) == 8


def test_several_images_are_a_table_on_stdout(folder, capsys):
    main(["predict", str(folder / "g.png"), str(folder / "h.bmp"), "--onnx", str(NET)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("path,class,probability,airplane,") and len(rows) == 2


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are text there")
def test_a_name_of_any_bytes_arrives_as_it_is(folder, network, tmp_path):
    strange = os.path.join(os.fsencode(folder), b"\xff\xfe.png")
    os.rename(folder / "g.png", strange)
    with open(tmp_path / "table.csv", "w", encoding="utf-8") as table:
        write_csv([os.fsdecode(strange)], network, table)
    assert strange in (tmp_path / "table.csv").read_bytes()


def test_a_table_is_whole_in_a_narrow_code_page(folder):
    """As on Windows, where output into a file lacks most signs."""
    names = [folder / "h.bmp", (folder / "g.png").rename(folder / "狗.png")]
    command = [sys.executable, "-m", "tinycifar", "predict", *names, "--onnx", NET]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert len(done.stdout.decode().splitlines()) == 3 and "狗.png" in done.stdout.decode()


def test_a_terminal_shows_the_progress(folder, network, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for to, shown in ((io.StringIO(), True), (Terminal(), False)):  # not between the rows
        monkeypatch.setattr(sys, "stderr", Terminal())
        write_csv(image_files(folder), network, to)
        assert ("9/9" in sys.stderr.getvalue()) == shown
        assert "skipped: " in sys.stderr.getvalue()


def test_files_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "other.onnx"
    with pytest.raises(FileNotFoundError, match=r"no ONNX file at .*other\.onnx: make export"):
        load_onnx(file)
    whole = NET.read_bytes()
    for damaged in (b"", b"no network", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"other\.onnx (can't be loaded|was not written)"):
            load_onnx(file)
    assert whole.count(b"tinycifar") >= 1
    file.write_bytes(whole.replace(b"tinycifar", b"otherwise"))
    with pytest.raises(ValueError, match=r"other\.onnx was not written by make export"):
        load_onnx(file)


def test_images_of_another_shape_are_refused(network):
    for net in (network, TorchNetwork(load_pretrained())):
        assert net(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10)
        for images in (np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8)):
            with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, 32, 32, 3\); got"):
                net(images)


def test_predict_takes_either_network_and_classify_any_iterable(network, folder):
    ((name, result),) = classify(folder.glob("g.png"), network)
    expected = likeliest(result, network.classes, top=3)
    for model in (network, load_pretrained(network.metadata["run"])):
        assert dict(predict(name, model, top=3)) == pytest.approx(dict(expected), abs=1e-4)
    assert predict(io.BytesIO(name.read_bytes()), network, top=3) == expected


def fails(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["predict", *map(str, arguments)])
    return capsys.readouterr().err


def test_what_is_missing_or_contradicts_is_said(folder, capsys, monkeypatch, tmp_path):
    said = fails([folder / "g.png", "--csv", folder / "h.bmp"], capsys)
    assert "--csv must end in .csv" in said  # or an image would be lost
    gone = tmp_path / "gone" / "table.csv"
    assert f"make it first: {gone}" in fails([folder / "g.png", "--csv", gone], capsys)
    assert "not both" in fails([folder / "g.png", "--onnx", NET, "--run", "quick"], capsys)
    assert "no image at" in fails([tmp_path / "gone.png", "--onnx", NET], capsys)
    (tmp_path / "none").mkdir()
    assert "no images in" in fails([tmp_path / "none", "--onnx", NET], capsys)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in fails([folder / "g.png", "--onnx", NET], capsys)


def test_an_empty_name_is_not_the_working_folder():
    with pytest.raises(ValueError, match="the name of an image is empty"):
        image_files("")


def test_what_is_hidden_in_a_folder_is_left_out(tmp_path):
    (tmp_path / ".here" / "album.png").mkdir(parents=True)  # a folder
    for name in ("cat.png", "._cat.png", ".thumbnails/cat.png", "more/dog.JPG", "z.png"):
        file = tmp_path / ".here" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = image_files(tmp_path / ".here")
    assert [str(file.relative_to(tmp_path / ".here")) for file in found] == [
        "cat.png",
        "more/dog.JPG",
        "z.png",
    ]


def test_a_single_name_is_not_taken_letter_by_letter(network):
    with pytest.raises(TypeError, match=r"a list of files, also for one: \['cat.png'\]"):
        next(classify("cat.png", network))
