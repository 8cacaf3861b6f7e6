"""The files of CIFAR-10: found, verified, downloaded where they aren't there.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from torch.hub import download_url_to_file
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from tinycifar.checks import DataError, DataUnavailable
from tinycifar.paths import absolute
from tinycifar.shapes import Arrays

ANSWER_SECONDS = 5  # how long the host may take to send its first byte
STALL_SECONDS = 15  # how long a download may stand still; with the above, an absent network
#                     is reported within 30 s
PARTIAL = ".cifar10-download-"  # a download in progress, inside the data folder
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError)
ITSELF = (CIFAR10.base_folder, CIFAR10.filename)  # what the data folder holds: either will do
ALTERED = "is truncated or altered (its MD5 sum is wrong)"


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The folder that `load` takes CIFAR-10 from: `root`, else CIFAR10_ROOT, else `data`.

    If that names the folder of batches itself, or the archive, its parent folder is returned.
    """
    chosen = absolute(root or os.environ.get("CIFAR10_ROOT") or "data")
    for folder in (chosen, chosen.resolve()):  # a link may be called otherwise
        if folder.name in ITSELF and not any((folder / name).exists() for name in ITSELF):
            return folder.parent
    return chosen


def read_cifar10(folder: str | os.PathLike | None, progress: bool) -> Arrays:
    """Training images and labels, test images and labels; fetched first when they aren't there.

    For what is raised see `data.load`.
    """
    root = data_root(folder)
    try:
        if root.is_file():
            raise NotADirectoryError("it is a file")
        if not (root / CIFAR10.base_folder).exists():
            _fetch(root, progress)
        _check_files(root / CIFAR10.base_folder)
        return *_read(root, train=True), *_read(root, train=False)
    except OSError as error:
        raise DataError(
            f"CIFAR-10 can't be read from or written to {root} ({error.strerror or error}): free "
            "some space or mend the permissions there, or set CIFAR10_ROOT to another folder."
        ) from error


def _read(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    part = CIFAR10(str(root), train=train)
    return np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64)


def _check_files(folder: Path) -> None:
    """Name the file that isn't what it should be; torchvision only says that there is one."""
    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
        if not check_integrity(folder / name, md5):
            fault = ALTERED if (folder / name).is_file() else "is missing"
            raise DataError(
                f"{folder / name} {fault}: replace it, or delete the folder {folder} and run again "
                "to have CIFAR-10 downloaded."
            )


def _fetch(root: Path, progress: bool) -> None:
    """Put the folder of batches into root, from the archive there or else from the network.

    It is unpacked beside its final place and renamed, so that one killed half-way leaves nothing
    that looks finished.
    """
    if any((root / name).exists() for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]):
        raise DataError(
            f"{root} holds CIFAR-10, but isn't called {CIFAR10.base_folder}: rename it to that."
        )
    archive = root / CIFAR10.filename
    found = archive.exists()
    if found and not check_integrity(archive, CIFAR10.tgz_md5):
        raise DataError(
            f"{archive} {ALTERED}: delete it and run again to have CIFAR-10 downloaded."
        )
    if not found and (fault := _fault(CIFAR10.url)):
        raise _cant_be_had(root, fault)
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=root) as partial:
        if not found:
            archive = Path(partial, CIFAR10.filename)
            _download(archive, root, progress)
        extract_archive(archive, partial)
        try:
            os.rename(Path(partial, CIFAR10.base_folder), root / CIFAR10.base_folder)
        except OSError:  # another process may have been faster
            if not (root / CIFAR10.base_folder).exists():
                raise


def _download(archive: Path, root: Path, progress: bool) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)  # the only way to reach the sockets of urllib's callers
    try:
        download_url_to_file(CIFAR10.url, str(archive), progress=progress)
    except NETWORK_ERRORS as error:
        raise _cant_be_had(root, "broke off or stalled") from error
    finally:
        socket.setdefaulttimeout(timeout)
    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise _cant_be_had(root, "sent something else (its MD5 sum is wrong)")


def _cant_be_had(root: Path, what: str) -> DataUnavailable:
    host = urlsplit(CIFAR10.url).netloc
    return DataUnavailable(
        f"CIFAR-10 is not in {root} and its host {host} {what}: set CIFAR10_ROOT to the folder "
        f"that holds {CIFAR10.base_folder}, or put {CIFAR10.filename} into {root}, or choose "
        "the dataset shapes."
    )


def _fault(url: str) -> str | None:
    """What is wrong with the host, if it sends no byte in time.

    Asked in a thread, as looking up its name has no timeout.
    """
    faults: list[str | None] = []
    silent = f"gave no answer (waited up to {ANSWER_SECONDS} s)"

    def ask() -> None:
        try:
            with urlopen(url, timeout=ANSWER_SECONDS) as response:
                faults.append(None if response.read(1) else silent)
        except HTTPError as error:
            faults.append(f"refused ({error.code} {error.reason})")
        except (OSError, HTTPException):
            faults.append(silent)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return faults[0] if faults else silent


def _sweep(root: Path) -> None:
    """Remove what killed downloads left; a day old, since another may be under way."""
    for left in root.glob(PARTIAL + "*"):
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
