"""Python's collector of cyclic garbage, in processes that answer while somebody waits."""

from __future__ import annotations

import gc


def settle() -> None:
    """Let no later collection look at the objects of today, which stay until the process ends.

    A full collection stops every thread of the process. Over the modules of torch and Ray it takes some 0.2 seconds,
    which is several batches of a server; those that follow this have only what has been made since to go through.
    """
    gc.collect()
    gc.freeze()
