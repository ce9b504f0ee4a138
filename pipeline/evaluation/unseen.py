"""The prompts that a report is drawn for, of which no pair was made."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.recipe import Recipe
from pipeline.text import encoder
from pipeline.text.prompts import PromptList


def prompts(recipe: Recipe) -> PromptList | None:
    """The prompts of ``evaluate.captions``, or those of the pairs' file behind the rows that pairs use.

    None for a teacher that takes classes. Refused where a pair may have been made of one, and where they are too few.
    """
    settings, count = recipe.evaluate.captions, recipe.pairs.count
    caption = checkpoints.caption_shape(recipe.teacher)
    if caption is None:
        if settings.uri:
            raise Refused(f"evaluate.captions.uri is {settings.uri}, and the teacher takes classes; leave it out.")
        return None
    uri = settings.uri or recipe.captions.uri
    if not uri:
        raise Refused("the teacher takes captions and neither captions.uri nor evaluate.captions.uri is set; set one.")
    shared = recipe.captions.uri is not None and storage.resolve(uri) == storage.resolve(recipe.captions.uri)
    skip = settings.skip or (count if shared else 0)
    if shared and skip < count:
        raise Refused(
            f"evaluate.captions.skip is {skip}, but pairs are made of the first {count:,} rows (pairs.count) of {uri};"
            f" set it to {count} or more, or give prompts of their own."
        )
    found = PromptList.open(uri, settings.column or recipe.captions.column, skip, name="evaluate.captions")
    if len(found) < recipe.evaluate.count:
        raise Refused(
            f"evaluate.captions has {len(found):,} prompts, {uri} from row {skip:,} on, for evaluate.count"
            f" {recipe.evaluate.count:,}; give more, or lower evaluate.count."
        )
    return found


def facts(recipe: Recipe, found: PromptList) -> dict[str, Any]:
    """Prompts and encoder as facts for fingerprints and report."""
    caption = checkpoints.caption_shape(recipe.teacher)
    assert caption
    length, width = caption
    return {"prompts": found.facts(), "encoder": encoder.check(recipe.text, width, length) if width else None}
