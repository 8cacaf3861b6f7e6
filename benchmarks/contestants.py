"""The two ways of training that are compared, each in a process of its own.

    python benchmarks/contestants.py reference

answers each line `N` on its input with a line of JSON: the seconds that its next N steps took. A
process of its own, since the allocator's setting and the threads' behaviour belong to a process.
"""

import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

BATCH = 128
SMALL = 32  # as the recipes `quick`, `sprint` and `tuned` have it
POLICY = "reference"
# Both on the same; not on MPS, where nothing here waits for the steps to end.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reference():
    """Training as the reference notebook does it, a step each time `next` is called.

    The same network and policy; one image at a time by albumentations in a DataLoader with two
    workers; NCHW, float32, eager; loss and hits read at every step.
    """
    import tinycifar.data as cifar10
    import tiny_cifar10_net
    from tinycifar import training

    # The network as its author has it: no detour for dilated depthwise convolutions.
    tiny_cifar10_net.DepthwiseConv.forward = torch.nn.Conv2d.forward
    data = cifar10.load()
    stats = cifar10.channel_stats(data.train_images)
    images = Images(data.train_images, data.train_labels, stats)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=2, drop_last=True
    )
    model = tiny_cifar10_net.NetCIFAR10_Tiny().to(DEVICE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.045, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    loss_sum = hits = 0.0
    with training._float32():  # as ours
        while True:
            for images, labels in loader:
                images, labels = images.to(DEVICE), labels.to(DEVICE)
                optimizer.zero_grad()
                output = model(images)
                loss = F.nll_loss(output, labels)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item()
                hits += (output.argmax(dim=1) == labels).sum().item()
                yield {}


class Images(Dataset):
    def __init__(self, images, labels, stats):
        self.images, self.labels, self.stats = images, labels, stats

    @functools.cached_property
    def transform(self):  # made by whom it serves: a loader's process that is spawned isn't sent it
        from augment import albumentations_transform

        return albumentations_transform(POLICY, self.stats.mean, self.stats.std)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(image=self.images[i])["image"], self.labels[i]


def ours(batch_size=BATCH, compiled=True, threads=None, precision="float32"):
    """The engine of training.py, a step each time `next` is called; yields a step's parts."""
    import tinycifar.data as cifar10
    from tinycifar import recipes
    from tinycifar import training

    if threads:
        torch.set_num_threads(threads)
    recipe = recipes.get_recipe(
        "baseline", batch_size=batch_size, precision=precision, policy=POLICY, name="bench"
    )
    problem = training._Problem(cifar10.load(), "full")
    with tempfile.TemporaryDirectory() as folder, training._repeatable(DEVICE):
        run = training._Run(recipe, 0, problem, DEVICE, 0, Path(folder), False, compiled)
        run.model.train()
        epoch = 0
        while True:
            epoch += 1
            yield from steps(run, run.feed.epoch(epoch))


def steps(run, batches):
    """Whole batches through the parts of `_Run._step`, with a clock between them."""
    clock = Clock(run.device)
    for images, labels in batches:
        if len(labels) < run.recipe.batch_size:
            break
        clock.lap("data and augmentation")
        output = run.network(images)
        loss = F.nll_loss(output, labels)
        clock.lap("forward")
        run.model.zero_grad(set_to_none=True)
        loss.backward()
        clock.lap("backward")
        for optimizer in run.optimizers:
            optimizer.step()
        (output.detach().argmax(dim=1) == labels).sum()
        clock.lap("optimizer and metrics")
        yield clock.laps
        clock.start()


class Clock:
    """Seconds by part of a step. On a GPU, where steps overlap, the parts aren't told apart."""

    def __init__(self, device):
        self.cpu = device.type == "cpu"
        self.laps: dict[str, float] = {}
        self.start()

    def start(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        if self.cpu:
            now = time.perf_counter()
            self.laps[name], self.last = now - self.last, now


CONTESTANTS = {
    "reference": reference,
    "ours": ours,
    "ours-eager": lambda: ours(compiled=False),
    "ours-one-thread": lambda: ours(threads=1),
    "ours-bfloat16": lambda: ours(precision="bfloat16"),
    "ours-bfloat16-one-thread": lambda: ours(precision="bfloat16", threads=1),
    "ours-small": lambda: ours(SMALL),
    "ours-small-one-thread": lambda: ours(SMALL, threads=1),
}


def wait_for_device():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main():
    import engine

    contestant = CONTESTANTS[sys.argv[1]]()
    next(contestant)  # the first step: loads the data and compiles
    wait_for_device()
    print(json.dumps({"peak_memory_mib": engine.peak_memory()}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        laps = [next(contestant) for _ in range(int(line))]
        wait_for_device()
        seconds = time.perf_counter() - started
        parts = {name: sum(lap[name] for lap in laps) for name in laps[0]}
        answer = {"seconds": seconds, "parts": parts, "peak_memory_mib": engine.peak_memory()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
