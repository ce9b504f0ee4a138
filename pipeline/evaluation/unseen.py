"""The prompts that a report is drawn for, of which no pair was made, and the real images that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import realpath
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.digits import captions
from pipeline.host.errors import Refused
from pipeline.models import checkpoints
from pipeline.recipe import Recipe, fingerprint
from pipeline.report.origin import Conditions
from pipeline.scoring import real_images
from pipeline.scoring.real_images import ImageRows
from pipeline.text import encoder
from pipeline.text.prompts import PromptList, hashes

BLOCK = 1 << 16  # prompts of the pairs that are looked at together
CUT = 60  # characters of a prompt in a sentence


@dataclass(frozen=True)
class UnseenPrompts:
    """The prompts of a report by sample id: a ``Conditioning``.

    Attributes:
        listed: rows of a file from row ``skip`` on.
        skip: rows of the file that come before.
        rows: those of ``listed`` that count, int64; None for all. Where the file holds the real images too, rows
            without an image are not among them.
    """

    listed: PromptList
    skip: int
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.listed) if self.rows is None else len(self.rows)

    def __call__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The prompts of samples, an object array of str [len(ids)]."""
        if self.rows is None:
            return self.listed(ids)
        return self.listed(self.rows[(np.asarray(ids, dtype=np.uint64) % np.uint64(len(self.rows))).astype(np.int64)])

    def facts(self) -> dict[str, Any]:
        """What identifies them, for fingerprints and report."""
        chosen = {} if self.rows is None else {"chosen": fingerprint({"rows": self.rows.tolist()})}
        return self.listed.facts() | {"skip": self.skip} | chosen


def prompts(recipe: Recipe) -> UnseenPrompts | None:
    """The prompts of ``evaluate.captions``, or those of the pairs' file behind the rows that pairs use.

    None for a teacher that takes classes. Refused where a pair may have been made of one, and where they are too few.
    """
    settings, count = recipe.evaluate.captions, recipe.pairs.count
    if checkpoints.caption_shape(recipe.teacher) is None:
        if settings.uri:
            raise Refused(f"evaluate.captions.uri is {settings.uri}, and the teacher takes classes; leave it out.")
        return None
    uri = place(recipe)
    if not uri:
        raise Refused("the teacher takes captions and neither captions.uri nor evaluate.captions.uri is set; set one.")
    shared = recipe.captions.uri is not None and _same(uri, recipe.captions.uri)
    skip = settings.skip or (count if shared else 0)
    if shared and skip < count:
        raise Refused(
            f"evaluate.captions.skip is {skip}, but pairs are made of the first {count:,} rows (pairs.count) of {uri};"
            f" set it to {count} or more, or give prompts of their own."
        )
    if shared and not settings.skip and (rows := PromptList.open(uri, column(recipe)).rows) <= count:
        raise Refused(
            f"pairs are made of all {rows:,} rows of {uri} (pairs.count {count:,}), so none are left for the report;"
            " give evaluate.captions.uri prompts of their own, or captions.uri a longer list."
        )
    listed = PromptList.open(uri, column(recipe), skip, name="evaluate.captions")
    found = UnseenPrompts(listed, skip, _with_images(recipe, listed, skip))
    if len(found) < recipe.evaluate.count:
        having = "" if found.rows is None else " with an image"
        raise Refused(
            f"evaluate.captions has {len(found):,} prompts{having}, {uri} from row {skip:,} on, for evaluate.count"
            f" {recipe.evaluate.count:,}; give more, or lower evaluate.count."
        )
    return found


def place(recipe: Recipe) -> str | None:
    """The file or folder of the report's prompts."""
    return recipe.evaluate.captions.uri or recipe.captions.uri


def column(recipe: Recipe) -> str:
    """The column of prompts there."""
    return recipe.evaluate.captions.column or recipe.captions.column


def facts(recipe: Recipe, found: UnseenPrompts) -> dict[str, Any]:
    """Prompts and encoder as facts for fingerprints and report.

    ``outside the grammar`` is the first prompt that the digits' measure cannot read, None where it can read all.
    """
    caption = checkpoints.caption_shape(recipe.teacher)
    assert caption
    length, width = caption
    digits = recipe.evaluate.features == "digits"
    return {
        "prompts": found.facts(),
        "encoder": encoder.check(recipe.text, width, length) if width else None,
        "outside the grammar": outside_grammar(found, recipe.evaluate.count) if digits else None,
    }


def origin(recipe: Recipe, found: UnseenPrompts, checked: dict[str, Any]) -> Conditions:
    """Prompts and encoder as the report says where they are from; ``checked`` are the facts of ``facts``."""
    prompts: Any = found.facts()
    prompts |= {"uri": place(recipe), "SHA-256": prompts.pop("sha256")}
    prompts["also among the pairs' prompts"] = repeated(recipe, found)
    if not checked["encoder"]:
        return {"prompts": prompts}
    features: Any = {"uri": recipe.text.encoder, **checked["encoder"]}
    return {"prompts": prompts, "encoder": features}


def repeated(recipe: Recipe, found: UnseenPrompts) -> int | None:
    """How many of the report's prompts also occur among those of the pairs; None where no pairs' prompts are named.

    Capital letters and the number of blanks do not count. Prompts are compared by 64 bits of a hash, a block at a time,
    so that millions of them need no memory.
    """
    if not recipe.captions.uri:
        return None
    of_pairs = PromptList.open(recipe.captions.uri, recipe.captions.column)
    asked = hashes(_plain(found(range(recipe.evaluate.count))))
    wanted = np.unique(asked)
    seen = np.zeros(len(wanted), dtype=bool)
    rows = min(recipe.pairs.count, len(of_pairs))
    for start in range(0, rows, BLOCK):
        seen |= np.isin(wanted, hashes(_plain(of_pairs(range(start, min(start + BLOCK, rows))))))
    return int(np.isin(asked, wanted[seen]).sum())


def _plain(texts: np.ndarray) -> list[str]:
    return [" ".join(text.casefold().split()) for text in texts]


# ---- the real images of these prompts


def reference(recipe: Recipe, found: UnseenPrompts) -> dict[str, Any]:
    """What the prompts add to the facts of the reference: ``described``, whether its images are those of the prompts.

    Where it is known that they are, there is one image for every prompt in their order. Where the file holds more,
    ``images`` of them count and ``first`` says how many stand before those. Refused where the reference holds prompts
    and they are others.
    """
    count, uri = recipe.evaluate.count, _images_place(recipe)
    if recipe.evaluate.features == "digits":
        if not real_images.has_placements(recipe.evaluate):
            return {"described": False}
        return {"images": count, "first": found.skip, "described": True, "SHA-256": found.listed.facts()["sha256"]}
    if not uri or column(recipe) not in real_images.columns(uri):
        return {"described": False}
    images = _image_rows(uri)
    rows = images.rows()
    if found.rows is None:
        _check_described(recipe, found, uri, rows)
        return {"described": True}
    return {"images": count, "first": int((rows < found.skip).sum()), "described": True}


def _check_described(recipe: Recipe, found: UnseenPrompts, uri: str, rows: np.ndarray) -> None:
    """Refuse a reference whose rows with images do not hold the report's prompts, all of them in their order."""
    listed, count = PromptList.open(uri, column(recipe), name="evaluate.reference"), recipe.evaluate.count
    common = min(count, len(rows))
    mine, theirs = found(range(common)), listed(rows[:common])
    differing = np.flatnonzero(mine != theirs)
    if len(differing):
        i = int(differing[0])
        said = f"row {rows[i]} reads {_quoted(theirs[i])} where prompt {i} is {_quoted(mine[i])}"
    elif len(rows) == count:
        return
    elif len(rows) > count:
        said = f"row {rows[count]} is beyond the last prompt"
    else:
        said = f"prompt {common} has no row"
    raise Refused(
        f"evaluate.reference {uri} does not hold the images of the report's prompts: {len(rows):,} images for"
        f" {count:,} prompts (evaluate.count), and {said}; set evaluate.captions.uri to that file too, or give a"
        " reference of these very prompts."
    )


def _with_images(recipe: Recipe, listed: PromptList, skip: int) -> np.ndarray | None:
    """Which of the prompts from row ``skip`` on have an image, where the file of prompts is that of real images too."""
    uri, images_uri = place(recipe), _images_place(recipe)
    if recipe.evaluate.features == "digits" or not (uri and images_uri and _same(uri, images_uri)):
        return None
    images = _image_rows(images_uri)
    if images.row_count != len(listed) + skip:
        raise Refused(
            f"{uri} has {len(listed) + skip:,} rows as evaluate.captions and {images.row_count:,} as"
            " evaluate.reference, which looks into folders of it too; put all Parquet files into one folder."
        )
    rows = images.rows()
    return rows[rows >= skip][: recipe.evaluate.count] - skip


def _image_rows(uri: str) -> ImageRows:
    images = real_images.of_file(uri, 1)
    assert isinstance(images, ImageRows)  # who asks has seen its columns
    return images


def _images_place(recipe: Recipe) -> str | None:
    """Where the real images are, if the recipe names any."""
    return recipe.evaluate.images or recipe.evaluate.reference


def _same(one: str, other: str) -> bool:
    """Whether two URIs lead to one place; links and dots in a path do not make another."""
    first, second = (uri if storage.is_remote(uri) else realpath(uri) for uri in map(storage.resolve, (one, other)))
    return first == second


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= CUT else line[: CUT - 1] + "…")


# ---- the digits' own measure


def outside_grammar(found: UnseenPrompts, count: int) -> int | None:
    """The first of ``count`` prompts that is no caption of the digits; None where all are."""
    for start in range(0, count, BLOCK):
        for i, text in enumerate(found(range(start, min(start + BLOCK, count)))):
            try:
                captions.named_by(text)
            except Refused:
                return start + i
    return None
