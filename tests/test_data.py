"""data.py: what is loaded, what is refused, what stands in, and how it is split and measured."""

import errno
import hashlib
import http.server
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tinycifar import cifar10, data
from tinycifar.data import CLASSES, PROTOCOLS, DataError, DataSplits, channel_stats, load, split
from tinycifar.paths import absolute
from tinycifar.shapes import SHAPES


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A CIFAR-10 of 20 images a file, its archive, and torchvision's MD5 sums made to match."""
    folder = tmp_path / "source" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lists = {"train_list": [], "test_list": []}
    for which in lists:
        for name, _ in getattr(CIFAR10, which):
            batch = {
                "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
                "labels": [i % 10 for i in range(20)],
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            lists[which].append([name, md5(folder / name)])
        monkeypatch.setattr(CIFAR10, which, lists[which])
    meta = folder / CIFAR10.meta["filename"]
    meta.write_bytes(pickle.dumps({"label_names": list(CLASSES)}, protocol=2))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(meta)})

    archive = tmp_path / "served" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{free_port()}/{CIFAR10.filename}")
    monkeypatch.setenv("no_proxy", "*")
    return SimpleNamespace(root=folder.parent, folder=folder, archive=archive)


@pytest.fixture
def served(fake, monkeypatch):
    """The same, with a host on this machine that has the archive; counts what it was asked."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=fake.archive.parent)

        def log_message(self, *args):
            asked.append(args)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args):
            """Hung up on after the first byte: that is how `load` asks whether it's there."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", address)
        yield SimpleNamespace(**vars(fake), asked=asked)
        server.shutdown()


@pytest.fixture
def silent(fake, monkeypatch):
    """The same, with a host that takes calls, may send `prefix`, and then says nothing more."""
    host = SimpleNamespace(**vars(fake), prefix=b"")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        calls = []

        def answer():
            while True:
                try:
                    call, _ = listener.accept()
                except OSError:
                    return
                calls.append(call)  # kept, or it would be closed
                call.sendall(host.prefix)

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/{CIFAR10.filename}")
        yield host
        listener.shutdown(socket.SHUT_RDWR)
        for call in calls:
            call.close()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def free_port() -> int:
    """A port at which nothing listens: calls to it are refused at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    return text


# -- the real data set -----------------------------------------------------------------------------


def test_real_arrays(real):
    assert (real.name, real.title, real.limit) == ("cifar10", "CIFAR-10", None)
    assert real.classes == CLASSES and len(real.checksum) == 64
    for part, n in (("train", 50_000), ("test", 10_000)):
        images, labels = getattr(real, f"{part}_images"), getattr(real, f"{part}_labels")
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        assert images.flags.c_contiguous and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [n // 10] * 10


def test_real_stats_to_8_digits(real):
    stats = channel_stats(real.train_images)
    assert [round(x, 8) for x in stats.mean] == [0.49139968, 0.48215841, 0.44653091]
    assert [round(x, 8) for x in stats.std] == [0.24703223, 0.24348513, 0.26158784]


def test_real_split(real):
    train, val = split(real.train_labels)
    assert (len(train), len(val)) == (45_000, 5_000)
    assert np.bincount(real.train_labels[val]).tolist() == [500] * 10


def test_real_copy_with_one_byte_altered_is_named(real, tmp_path):
    source = cifar10.data_root() / CIFAR10.base_folder
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    altered = folder / "data_batch_3"
    altered.unlink()
    shutil.copyfile(source / "data_batch_3", altered)
    with open(altered, "r+b") as file:
        file.seek(20_000_000)
        byte = file.read(1)[0]
        file.seek(20_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match="data_batch_3 is truncated or altered"):
        load("cifar10", root=tmp_path)


# -- on the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_folder_is_taken_as_it_is(fake, dataset, capsys):
    data = load(dataset, root=fake.root)
    batch = pickle.loads((fake.folder / "data_batch_2").read_bytes())
    first = batch["data"][0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert data.name == "cifar10" and data.train_images.shape == (100, 32, 32, 3)
    assert np.array_equal(data.train_images[20], first)
    assert data.test_labels.tolist() == [i % 10 for i in range(20)]
    assert capsys.readouterr().out == ""


def test_checksum_covers_every_image_and_label(fake):
    data = load("cifar10", root=fake.root)
    arrays = data.train_images, data.train_labels, data.test_images, data.test_labels
    expected = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    assert data.checksum == expected
    other = replace(data, train_labels=(data.train_labels + 1) % 10)
    assert other.checksum != data.checksum, "or it could resume a run of the other"


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
@pytest.mark.parametrize("fault", ["truncated", "altered", "missing"])
def test_damaged_file_is_named_and_kept(served, dataset, name, fault):
    path = served.folder / name
    whole = path.read_bytes()
    damaged = whole[:-1] if fault == "truncated" else whole[:-9] + b"?" + whole[-8:]
    path.write_bytes(damaged)
    if fault == "missing":
        path.unlink()
    with pytest.raises(DataError, match=f"{name} is {fault[:4]}|{name} is .*{fault}") as error:
        load(dataset, root=served.root)
    assert "delete the folder" in one_sentence(error)
    assert not served.asked  # never downloaded over what is there
    assert fault == "missing" or path.read_bytes() == damaged


def test_root_is_a_parameter_or_the_environment_or_data(fake, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(fake.root))
    assert load("cifar10").name == "cifar10"
    with pytest.raises(DataError) as error:  # the parameter goes first
        load("cifar10", root="no such folder")
    assert str(absolute("no such folder")) in one_sentence(error)
    monkeypatch.setenv("CIFAR10_ROOT", "nor this one")
    with pytest.raises(DataError, match="nor this one"):
        load("cifar10")
    monkeypatch.chdir(fake.root.parent)
    monkeypatch.delenv("CIFAR10_ROOT")
    fake.root.rename(fake.root.parent / "data")
    assert load("cifar10").name == "cifar10"


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
@pytest.mark.parametrize("named", ["folder", "archive", "folder/", "link", "link's folder"])
def test_root_may_name_the_batches_or_the_archive_itself(served, tmp_path, dataset, named):
    root = served.archive if named == "archive" else served.folder
    if named == "folder/":
        root = f"{root}/"
    if named.startswith("link"):  # to the folder of batches, which either may be called otherwise
        if named == "link's folder":
            root = root.rename(tmp_path / "batches")
        link = tmp_path / ("mine" if named == "link" else CIFAR10.base_folder)
        link.symlink_to(root)
        root = link
    assert load(dataset, root=root, progress=False).name == "cifar10"
    assert not served.asked and not (served.folder / CIFAR10.base_folder).exists()


def test_a_download_into_a_folder_called_like_the_batches(served, tmp_path):
    """It is what is to be there, not where that is to be."""
    root = tmp_path / "new" / CIFAR10.base_folder
    assert load("cifar10", root=root, progress=False).name == "cifar10"
    assert (root / "data_batch_1").is_file()
    (root / CIFAR10.base_folder).mkdir()  # as earlier versions left it: taken as it is
    assert cifar10.data_root(root) == root


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_batches_in_a_folder_of_another_name_are_never_passed_over(served, tmp_path, dataset):
    served.folder.rename(tmp_path / "batches")
    with pytest.raises(DataError, match=rf"isn't called {CIFAR10.base_folder}: rename") as error:
        load(dataset, root=tmp_path / "batches")
    assert str(tmp_path / "batches") in one_sentence(error) and not served.asked


# -- from the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_download(served, tmp_path, dataset, capsys):
    root = tmp_path / "new" / "folder"
    data = load(dataset, root=root)
    assert data.checksum == load("cifar10", root=served.root).checksum
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]
    asked = len(served.asked)
    load(dataset, root=root, progress=False)
    assert len(served.asked) == asked


def test_download_is_silent_when_told(served, tmp_path, capsys):
    load("cifar10", root=tmp_path / "new", progress=False)
    assert capsys.readouterr() == ("", "")


def test_archive_on_the_disk_is_used(fake, capsys):
    assert load("cifar10", root=fake.archive.parent).name == "cifar10"
    assert fake.archive.exists() and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_damaged_archive_on_the_disk_is_named(served, tmp_path, dataset):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(served.archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{CIFAR10.filename} is truncated") as error:
        load(dataset, root=tmp_path)
    one_sentence(error)
    assert archive.exists() and not served.asked


def test_killed_download_is_no_obstacle(served, tmp_path):
    root = tmp_path / "new"
    for name, age in (("old", 48 * 3600), ("young", 0)):
        left = root / f"{cifar10.PARTIAL}{name}"
        (left / CIFAR10.base_folder).mkdir(parents=True)
        (left / CIFAR10.filename).write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    assert load("cifar10", root=root, progress=False).name == "cifar10"
    left = {path.name for path in root.iterdir()}
    assert left == {CIFAR10.base_folder, f"{cifar10.PARTIAL}young"}  # it may be at work yet


def test_no_network(fake, tmp_path):
    with pytest.raises(DataError) as error:
        load("cifar10", root=tmp_path)
    text = one_sentence(error)
    for part in (str(tmp_path), "127.0.0.1", "CIFAR10_ROOT", CIFAR10.filename, "shapes"):
        assert part in text


def test_host_that_never_answers(silent, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "ANSWER_SECONDS", 0.2)
        with pytest.raises(DataError, match=r"gave no answer \(waited up to 0\.2 s\)"):
            load("cifar10", root=tmp_path)
    assert cifar10.ANSWER_SECONDS + cifar10.STALL_SECONDS < 30


def test_name_server_that_never_answers(fake, tmp_path, monkeypatch):
    end, answered = threading.Event(), []

    def asked(*args, **kwargs):
        answered.append(end.wait(60))
        return []

    monkeypatch.setattr(cifar10, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(DataError, match="gave no answer"):
        load("cifar10", root=tmp_path)
    assert not answered, "it was waited for"
    end.set()


def test_download_that_stalls(silent, tmp_path, monkeypatch):
    silent.prefix = b"HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\nhalf of it"
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.5)
    with pytest.raises(DataError, match="broke off or stalled") as error:
        load("cifar10", root=tmp_path / "new", progress=False)
    one_sentence(error)
    assert not list((tmp_path / "new").iterdir())
    assert socket.getdefaulttimeout() is None


def test_host_that_refuses(served, tmp_path):
    served.archive.unlink()
    with pytest.raises(DataError, match=r"refused \(404 File not found\)") as error:
        load("cifar10", root=tmp_path / "new", progress=False)
    one_sentence(error)


def test_host_that_sends_something_else(served, tmp_path):
    served.archive.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(DataError, match="sent something else") as error:
        load("cifar10", root=tmp_path / "new", progress=False)
    one_sentence(error)
    assert not list((tmp_path / "new").iterdir())


def test_disk_full(served, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cifar10, "download_url_to_file", full)
    for dataset in ("auto", "cifar10"):
        with pytest.raises(DataError, match=r"No space left on device.*CIFAR10_ROOT") as error:
            load(dataset, root=tmp_path / "new")
        one_sentence(error)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_root_that_is_no_folder(fake, dataset):
    other = fake.archive.rename(fake.archive.with_name("other.tar.gz"))
    with pytest.raises(DataError, match=r"can't be read .*it is a file") as error:
        load(dataset, root=other)
    one_sentence(error)


# -- the stand-in ----------------------------------------------------------------------------------


def test_auto_falls_back_with_a_banner(fake, tmp_path, capsys):
    first = load("auto", root=tmp_path, limit=200)
    banner = capsys.readouterr().out
    assert "THIS IS NOT CIFAR-10" in banner and len(banner.splitlines()) > 8
    assert str(tmp_path) not in banner  # notebooks are published with it
    assert (first.name, first.classes) == ("shapes", SHAPES)
    assert "NOT CIFAR-10" in first.title and "200 training images" in first.title
    second = load("auto", root=tmp_path, limit=200)
    assert capsys.readouterr().out == banner and second.checksum == first.checksum


def test_auto_falls_back_to_no_more_than_there_is(fake, tmp_path):
    with pytest.raises(ValueError, match=r"shapes.* from 100 to 10,000; got 20000"):
        load("auto", root=tmp_path, limit=20_000)


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["mnist", "CIFAR10", "", None, 10])
def test_unknown_dataset_lists_the_known(dataset):
    with pytest.raises(DataError, match="auto, cifar10, shapes") as error:
        load(dataset)
    assert repr(dataset) in one_sentence(error)


@pytest.mark.parametrize("limit", [0, -1, 99, 10_001, 500.0, "500", True])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=r"limit .* whole number from 100 to 10,000"):
        load("shapes", limit=limit)


def test_limit_takes_the_first_of_each_class(monkeypatch):
    labels = np.repeat(np.arange(10), 30)[::-1].copy()
    images = np.arange(300, dtype=np.uint8).repeat(3072).reshape(300, 32, 32, 3)
    packed = data._pack("cifar10", CLASSES, (images, labels, images, labels), 104)
    assert np.bincount(packed.train_labels).tolist() == [11] * 4 + [10] * 6
    assert np.bincount(packed.test_labels).tolist() == [2] * 10
    assert packed.test_labels.tolist() == sorted(packed.test_labels, reverse=True)  # order is kept
    assert packed.test_images[:4, 0, 0, 0].tolist() == [0, 1, 30, 31]
    assert packed.title == "CIFAR-10, 104 training images"
    monkeypatch.setitem(data.SIZES, "cifar10", 300)
    whole = data._pack("cifar10", CLASSES, (images, labels, images, labels), 300)
    assert whole.limit is None and whole.title == "CIFAR-10", "all of it is no part"
    assert len(whole.train_labels) == len(whole.test_labels) == 300


# -- split -----------------------------------------------------------------------------------------


def test_split_is_stratified_and_repeatable():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    train, val = split(labels)
    assert train.dtype == val.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1000))
    assert np.array_equal(train, np.sort(train)) and np.array_equal(val, np.sort(val))
    assert np.bincount(labels[val]).tolist() == [10] * 10
    assert np.array_equal(val, split(labels)[1])


def test_a_part_of_sorted_images_has_all_classes():
    labels = np.repeat(np.arange(10), 100)
    index = np.flatnonzero(labels > 2)
    some = data.some_of(index, 70)
    assert len(set(some)) == 70 and set(labels[some]) == set(range(3, 10))
    assert np.array_equal(some, np.sort(data.some_of(torch.from_numpy(index), 70)))
    assert np.array_equal(data.some_of(index, 10_000), index)


def test_split_never_changes():
    """Published runs were selected on it."""
    labels = np.arange(60) % 3
    assert split(labels)[1].tolist() == [3, 11, 13, 20, 48, 55]


@pytest.mark.parametrize("counts", [(60, 30, 10), (13, 12, 15), (31, 64, 2)])
def test_split_of_unequal_classes(counts):
    labels = np.repeat([0, 1, 2], counts)
    train, val = split(labels)
    assert (len(train), len(val)) == (len(labels) - len(labels) // 10, len(labels) // 10)
    share = len(val) * np.array(counts) / len(labels)
    assert np.all(abs(np.bincount(labels[val], minlength=3) - share) <= 0.5)


@pytest.mark.parametrize("labels", [[], [1.5, 2.5], [[0, 1], [1, 0]], [0, 1, 2], ["a", "b"]])
def test_split_of_what_cannot_be_split(labels):
    with pytest.raises(ValueError, match=r"labels must be|can't be split"):
        split(labels)


def test_a_tenth_holds_an_image_of_each_class():
    with pytest.raises(ValueError, match=r"90 images of 10 classes .*at least 100 are needed"):
        split(np.arange(90) % 10)
    assert len(split(np.arange(100) % 10)[1]) == 10


# -- channel_stats ---------------------------------------------------------------------------------


def test_stats_against_float64():
    images = np.random.default_rng(0).integers(0, 256, (2345, 7, 5, 3), dtype=np.uint8)
    images[..., 1] //= 3
    stats = channel_stats(images)
    pixels = images.reshape(-1, 3) / 255.0
    assert np.allclose(stats.mean, pixels.mean(0), rtol=1e-12, atol=0)
    assert np.allclose(stats.std, pixels.std(0), rtol=1e-12, atol=0)
    assert all(type(x) is float for x in stats.mean + stats.std)


def test_stats_of_some_images():
    images = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3), dtype=np.uint8)
    index = np.arange(1, 2500, 2)
    assert channel_stats(images, index) == channel_stats(images[index])
    for wrong in ([], [0.5], [[1, 2]]):
        with pytest.raises(ValueError, match="index must be a list"):
            channel_stats(images, np.array(wrong))


def test_stats_of_a_constant():
    stats = channel_stats(np.full((3, 2, 2, 3), 255, dtype=np.uint8))
    assert (stats.mean, stats.std) == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_stats_of_something_else(images):
    with pytest.raises(ValueError, match="images must be uint8 of shape") as error:
        channel_stats(images)
    assert str(images.shape) in one_sentence(error)


# -- the protocols' parts --------------------------------------------------------------------------


def test_val_holds_back_a_stratified_tenth_of_the_training_set(tiny):
    splits = DataSplits(tiny, "val")
    train, val = split(tiny.train_labels)
    assert splits.train_index.tolist() == train.tolist()
    assert np.array_equal(splits.selection[0], tiny.train_images[val])
    assert splits.selection[1].tolist() == tiny.train_labels[val].tolist()
    assert not set(train) & set(val)
    assert splits.stats == channel_stats(tiny.train_images[train]), "of those trained on alone"
    assert splits.sizes == {"train": 180, "selection": 20, "test": 40}


def test_full_trains_on_all_and_selects_on_nothing(tiny):
    splits = DataSplits(tiny, "full")
    assert splits.train_index.tolist() == list(range(200)) and splits.selection is None
    assert splits.stats == channel_stats(tiny.train_images)
    assert splits.sizes == {"train": 200, "selection": 0, "test": 40}


def test_test_selected_trains_on_all_and_selects_on_test(tiny):
    splits = DataSplits(tiny, "test-selected")
    assert splits.sizes == {"train": 200, "selection": 40, "test": 40}
    assert np.array_equal(splits.selection[0], tiny.test_images)
    assert splits.selection[1].tolist() == tiny.test_labels.tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parts_that_every_protocol_has(tiny, protocol):
    splits = DataSplits(tiny, protocol)
    assert (splits.data, splits.protocol) == (tiny, protocol)
    for (images, labels), n in ((splits.train, 200), (splits.test, 40)):
        assert images.shape == (n, 32, 32, 3) and images.dtype == torch.uint8
        assert labels.shape == (n,) and labels.dtype == torch.int64
    assert np.shares_memory(splits.train[0].numpy(), tiny.train_images), "not a copy of 180 MB"
    assert np.array_equal(splits.test[0], tiny.test_images)


def test_an_unknown_protocol_lists_those_there_are(tiny):
    with pytest.raises(ValueError, match="unknown protocol 'test'; valid: val, full, test-sel"):
        DataSplits(tiny, "test")


# -- data of one's own -----------------------------------------------------------------------------


def twice(images):
    return images.repeat(2, axis=1).repeat(2, axis=2)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train_images": twice, "test_images": twice}, r"train_images must be uint8 .*64, 64, 3"),
        ({"test_images": twice}, r"test_images must be uint8 of shape \(N, 32, 32, 3\)"),
        ({"train_images": lambda x: x / 255}, r"train_images must be .*got float64"),
        ({"train_images": lambda x: x.transpose(0, 3, 1, 2)}, r"got uint8 of shape \(200, 3,"),
        ({"train_images": lambda x: x[..., :1]}, r"got uint8 of shape \(200, 32, 32, 1\)"),
        ({"train_images": torch.from_numpy}, "train_images must be a NumPy array, got Tensor"),
        ({"train_labels": list}, "train_labels must be a NumPy array, got list"),
        ({"train_labels": lambda y: y[:-1]}, r"train_labels must be int64 of shape \(200,\)"),
        ({"train_labels": lambda y: y.astype(np.float32)}, "train_labels must be .*got float32"),
        ({"test_labels": lambda y: y > 4}, "test_labels must be int64 .*got bool"),
        ({"test_labels": lambda y: y.astype(np.int32)}, "test_labels must be int64 .*got int32"),
        ({"train_labels": lambda y: y - 1}, "train_labels must be from 0 to 9, .*got -1 to 8"),
        ({"test_labels": lambda y: y + 1}, "test_labels must be from 0 to 9, .*got 1 to 10"),
        ({"test_images": lambda x: x[:0], "test_labels": lambda y: y[:0]}, "test_images must be"),
        ({"classes": lambda names: names[:9]}, "train_labels must be from 0 to 8"),
        ({"classes": lambda names: ()}, "classes must be a tuple of names"),
        ({"classes": lambda names: (*names[:9], names[0])}, "classes must be .*no two alike"),
        ({"classes": lambda names: tuple(range(10))}, "classes must be a tuple of names"),
        ({"classes": "".join}, "classes must be a tuple of names"),
    ],
)
def test_data_that_is_not_what_it_says_is_refused_by_name(tiny, changed, says):
    wrong = replace(tiny, **{name: make(getattr(tiny, name)) for name, make in changed.items()})
    with pytest.raises(ValueError, match=says) as error:
        DataSplits(wrong, "val")
    one_sentence(error)


def test_arrays_in_any_order_of_memory_are_taken(tiny):
    images = tiny.train_images[..., ::-1]  # BGR turned into RGB
    splits = DataSplits(replace(tiny, train_images=images), "val")
    assert np.array_equal(splits.train[0], images)
