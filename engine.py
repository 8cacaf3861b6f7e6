"""What makes a training step fast and keeps it small: the compiler and the allocator."""

from __future__ import annotations

import ctypes
import logging
import sys
import warnings
from collections.abc import Collection

import torch
from torch import Tensor, compile, nn

__all__ = ["CompiledNetwork", "Memory", "peak_memory"]


class CompiledNetwork:
    """A network called through torch.compile, for batches of the shapes that are worth it.

    Each shape is compiled anew, which takes as long as some thousand steps save: so for whole
    batches only, and only of the sides named. All others, such as the last batch of an epoch, run
    as they are, and so does everything where there is no compiler, after a warning. Both ways
    give the same sums but for their last digits.

    Args:
        model: a network of (N, 3, side, side) batches; its parameters stay its own.
        batch_size: N of a whole batch.
        sides: the sides, in pixels, that are compiled.
    """

    def __init__(self, model: nn.Module, batch_size: int, sides: Collection[int]):
        self.model, self.batch_size, self.sides = model, batch_size, set(sides)
        # It warns of a CUDA toolkit without a GPU, which is of no concern here.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # One shape, one program: with shapes left open, torch 2.12 fails on the dilated layers.
        self.program = compile(model, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != self.batch_size or images.shape[-1] not in self.sides:
            return self.model(images)
        try:
            return self.program(images)
        except Exception as error:
            # A fault of the network's own shows again in the plain call.
            output = self.model(images)
            self.sides = set()
            warnings.warn(
                f"torch.compile failed ({_reason(error)}): training goes on without, more slowly",
                stacklevel=2,
            )
            return output


def _reason(error: Exception) -> str:
    """What went wrong, in a line; torch's own message is a page."""
    if " " in torch.__file__:
        return "it can't from an environment whose path has a space in it"
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line or "No " in line]
    return lines[0] if lines else type(error).__name__


class Memory:
    """Has glibc keep large buffers that are freed, since the next step needs the same again.

    By default each goes back to the kernel, and every page of it is faulted in anew: measured, an
    eighth of a step. Elsewhere than on glibc nothing happens.
    """

    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

    def __init__(self):
        try:
            self.libc = ctypes.CDLL(None)
            self.libc.mallopt(self.M_MMAP_THRESHOLD, 2_000_000_000)
            self.libc.mallopt(self.M_TRIM_THRESHOLD, 2_000_000_000)
        except (OSError, AttributeError, TypeError):
            self.libc = None

    def trim(self) -> None:
        """Give all of it back: between epochs, as buffers of another size would come on top."""
        if self.libc is not None:
            self.libc.malloc_trim(0)


def peak_memory() -> int | None:
    """The most that this process has held in memory so far, in MiB; None where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
