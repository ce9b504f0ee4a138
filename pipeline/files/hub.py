"""The cache that huggingface_hub keeps (HF_HOME): where a file lies in it, asked without a network."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

# hf://[datasets/|spaces/]owner/name[@revision]/path; a revision with slashes is one of the Hub's own or is quoted.
FILE = re.compile(
    r"hf://(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert/[^/]+|pr/\d+)|[^/]+))?/(?P<path>.+)"
)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that the Hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def kept(uri: str) -> Path | None:
    """The file of an hf:// URI in the Hub's own cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    match = FILE.fullmatch(uri)
    if match is None:
        return None
    kind = match["kind"].removesuffix("s") if match["kind"] else None
    revision = unquote(match["revision"]) if match["revision"] else None
    found = try_to_load_from_cache(match["repo"], match["path"], revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None
