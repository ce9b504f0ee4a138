"""torch.compile from outside: the repeated blocks of a transformer, in place.

All blocks share one compiled form, so the time to compile does not grow with their number; nn.Module.compile leaves
names, state_dicts, copies and pickles as they are. A block is compiled again for another kind of input (a prefix after
single tokens, a batch of 1 after larger ones), not for another AR step: lengths and batches are symbols.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from pipeline.host.errors import Refused

# Kinds of input that blocks of one class may meet in a process. A teacher makes 8 at most, a student 3, and LlamaGen's
# two share a class; torch's own limit is 8. Beyond it torch raises: nothing becomes slow without a word.
FORMS = 32


def compiled(network: nn.Module, dynamic: bool | None = None, backend: Any = "inductor") -> None:
    """Have the blocks in ``network.layers`` compiled when they are first called, each as one graph.

    ``dynamic``: whether lengths are symbols from the first call on (a teacher's cache grows), or, with None, once they
    have changed.
    """
    for block in layers(network):
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend, recompile_limit=FORMS)


def layers(network: nn.Module) -> Iterable[nn.Module]:
    """``network.layers``, a transformer's repeated blocks, by their type."""
    return cast("Iterable[nn.Module]", network.layers)


def check(setting: str, device: str) -> None:
    """ValueError if this machine lacks the compiler that torch.compile calls; ``setting`` is the field to blame.

    On a GPU Triton builds its launchers with a C compiler, on a CPU torch builds the kernels themselves in C++.
    """
    if device == "cuda":
        variable, language, usual = "CC", "C", ["gcc", "clang"]
    else:
        variable, language, usual = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    wanted = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, wanted)):
        raise Refused(
            f"{setting} is true, but this machine has no {language} compiler ({' or '.join(wanted)}), which"
            f" torch.compile calls; install one, name it in {variable}, or set {setting} to false."
        )
