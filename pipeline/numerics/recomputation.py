"""Activation checkpointing from outside: modules that keep their input alone and compute the rest again when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(modules: Iterable[nn.Module]) -> None:
    """Have the modules forget what their backward pass needs, and run forward once more to get it.

    In place, and as ``nn.Module.compile`` does it: the attribute that torch looks at first, which names, state_dicts,
    copies and pickles leave out. After ``compiled``, if both are wanted: the compiled form is what runs twice. Modules
    must be functions of their input, without random numbers.
    """
    for module in modules:
        call = module._compiled_call_impl or module._call_impl
        module._compiled_call_impl = partial(_again, call)


def _again(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
