"""torch.hub entry point.

model = torch.hub.load("path/of/a/clone", "net_cifar10_tiny", source="local", pretrained=True)
"""

from __future__ import annotations

from typing import Any

from tiny_cifar10_net import NetCIFAR10_Tiny
from tinycifar.checks import check_flag
from tinycifar.weights import load_pretrained

dependencies = ["torch", "numpy", "PIL", "filelock"]


def net_cifar10_tiny(
    pretrained: bool = False, run: str | None = None, **options: Any
) -> NetCIFAR10_Tiny:
    """`NetCIFAR10_Tiny`, new or with the weights of a published run.

    Args:
        pretrained: True gives `load_pretrained(run)`: eval mode, with classes, mean and std.
        run: as for `load_pretrained`; None: its default, `taught`.
        options: of a new network, see `NetCIFAR10_Tiny`.

    Raises:
        ValueError: options given with pretrained=True, or a run without it; pretrained isn't bool.
    """
    check_flag("pretrained", pretrained)
    if not pretrained:
        if run is not None:
            raise ValueError(f"a new network has no run: say pretrained=True, or leave out {run!r}")
        return NetCIFAR10_Tiny(**options)
    if options:
        raise ValueError(f"a pretrained network has its own options; leave out {sorted(options)}")
    return load_pretrained() if run is None else load_pretrained(run)
