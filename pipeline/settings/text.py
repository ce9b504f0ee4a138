"""The prompts of a recipe whose teacher takes captions, and the text encoder that turns them into features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.configuration import fields
from pipeline.configuration.fields import Name, Range, Uri

Skip = Annotated[int, Range(0, 10**12, "0 or more, and at most 10^12")]


@dataclass(frozen=True)
class CaptionSettings:
    """The prompts that pairs are made of: prompt of a sample = row (id mod rows) of the file.

    Attributes:
        uri: a Parquet file or a folder of them (files by name, rows in order), or a text file (.txt), UTF-8, one
            prompt a line. None for a teacher that takes classes. Part of a pair set's fingerprint, by its content.
        column: of Parquet, the column of prompts.
    """

    uri: Uri | None = None
    column: Name = "caption"

    def __post_init__(self) -> None:
        fields.check(self, "captions")


@dataclass(frozen=True)
class UnseenSettings:
    """The prompts that a report is drawn for.

    Attributes:
        uri: as ``captions.uri``; None takes the file of the pairs, from its first row that no pair uses. A file that is
            evaluate.reference, too, is drawn for its rows with an image. A file with columns digit, down and right says
            which digits its captions describe, and those are the real images (features: digits).
        column: as ``captions.column``; None takes that.
        skip: rows of the file that are left out at its beginning.
    """

    uri: Uri | None = None
    column: Name | None = None
    skip: Skip = 0

    def __post_init__(self) -> None:
        fields.check(self, "evaluate.captions")


@dataclass(frozen=True)
class TextSettings:
    """How prompts become features.

    Attributes:
        encoder: URI of a folder in Hugging Face's layout with the encoder of a T5 and its tokenizer.
        precision: of the encoder, fp32 or bf16. T5's numbers leave the range of fp16, which is refused.
        length: tokens of a prompt that the encoder reads at most, the end token among them; what is beyond is cut.
        clean: rewrite every prompt as LlamaGen's authors did for training, before it is encoded. What is stored is the
            prompt as it was.
    """

    encoder: Uri | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    length: Annotated[int, Range(1, 4096, "1 or more, and at most 4,096")] = 120
    clean: bool = True

    def __post_init__(self) -> None:
        fields.check(self, "text")
