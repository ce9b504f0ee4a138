"""Training the digits' teacher of captions, and its text encoder with it.

It starts from the teacher of classes: the layers, the table of codes, the norm and the head are its own, the projection
of captions and the encoder are drawn at random. The tokenizer is that of the classes' teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.digits import captioned, captions, networks, properties, text_encoder
from pipeline.digits.pretrain import MADE, Averaged, Report, batches, reporter
from pipeline.models import checkpoints
from pipeline.models.base import Teacher
from pipeline.models.conditions import Captions
from pipeline.settings.teacher import TeacherSettings

NULL = 0.1  # probability of the null caption, which guidance needs
KEPT_EVERY = 250  # steps between two states that are written


@dataclass(frozen=True)
class CaptionPlan:
    """How long the teacher of captions trains, in steps of ``batch`` images, and how many captions ship."""

    steps: int
    batch: int = 32
    lr: float = 1.5e-3
    pairs: int = 20_000
    unseen: int = 5_000
    seed: int = 15

    def description(self) -> str:
        """One line for the card of the networks."""
        return (
            f"* llamagen-text: from llamagen-teacher, with its text encoder, {self.steps} steps of {self.batch} images"
            f" at learning rate {self.lr:g}, seed {self.seed}."
        )


class Joint(nn.Module):
    """The two networks that are trained as one."""

    def __init__(self, network: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.network, self.encoder = network, encoder


def captioned_settings(settings: TeacherSettings) -> TeacherSettings:
    """Those of a teacher of classes, for a teacher of the encoder's captions with the same layers."""
    shape = {"caption_dim": text_encoder.WIDTH, "caption_length": text_encoder.LENGTH}
    config = {name: value for name, value in settings.config.items() if name != "classes"} | shape
    return dataclasses.replace(settings, config=config)


def warm_start(network: nn.Module, source: nn.Module) -> None:
    """Give ``network`` every weight of ``source`` but the embedding of its condition."""
    own = network.state_dict()
    shared = {name: value for name, value in source.state_dict().items() if not name.startswith("cls_embedding.")}
    network.load_state_dict(own | shared)


def with_null(given: Captions, null: Captions, dropped: Tensor) -> Captions:
    """The captions ``given``, of which those that are ``dropped`` bool [B] have the features of ``null``.

    The mask stays that of the captions, as in the official training.
    """
    return Captions(torch.where(dropped[:, None, None], null.features, given.features), given.valid)


def train(
    teacher: Teacher,
    encoder: nn.Module,
    read: text_encoder.Reader,
    plan: CaptionPlan,
    report: Report,
) -> Iterator[Joint]:
    """Maximum likelihood of the codes given captions, new places and captions in every step; yields the average.

    Every ``KEPT_EVERY`` steps and after the last. One optimiser trains both networks, in float32.
    """
    generator = torch.Generator().manual_seed(plan.seed + 1)
    images, labels = networks.training_split()
    run = Averaged(Joint(teacher.network, encoder), plan.lr, plan.steps, weight_decay=0.05)
    for step, index in enumerate(batches(len(images), plan.batch, plan.steps, generator)):
        shown = networks.placed(images[index], generator)
        ids = np.arange(step * plan.batch, (step + 1) * plan.batch)
        texts = captions.composed(properties.described(shown, labels[index]), plan.seed, ids)
        given = text_encoder.features(encoder, *read(texts))
        null = cast(Captions, teacher.network.cls_embedding.null(given))  # type: ignore[operator, union-attr]
        dropped = torch.rand(len(index), generator=generator) < NULL
        codes = teacher.tokenizer.encode(shown)
        logits = teacher(with_null(given, null, dropped), codes)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        run.step(loss)
        if (step + 1) % 100 == 0:
            report(f"teacher step {step + 1}/{plan.steps}: cross-entropy {loss.item():.4f}")
        if (step + 1) % KEPT_EVERY == 0 or step + 1 == plan.steps:
            yield cast(Joint, run.average)


def make_captions(name: str, settings: TeacherSettings, plan: CaptionPlan, folder: str) -> None:
    """Write all that captions need beside the networks of a family of classes, whose ``settings`` are given.

    ``name``-text-teacher, the folder text-encoder, captions.parquet and unseen.parquet. A state that is good enough is
    there long before the end: the weights are written every ``KEPT_EVERY`` steps.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(plan.seed)
    report = reporter(f"{name}-text")
    captioned.write(captioned.training_captions(plan.seed, plan.pairs), f"{folder}/captions.parquet")
    captioned.write(captioned.unseen_captions(plan.seed + 1, plan.unseen), f"{folder}/unseen.parquet")
    report("captions written")
    settings = dataclasses.replace(
        settings,
        tokenizer=f"{folder}/{name}-tokenizer.safetensors",
        checkpoint=f"{folder}/{name}-teacher.safetensors",
    )
    of_classes = checkpoints.teacher(settings)
    new = captioned_settings(settings)
    teacher: Teacher = checkpoints.family(new).Teacher(checkpoints.config(new), new.filter)
    teacher.tokenizer = of_classes.tokenizer
    warm_start(teacher.network, of_classes.network)
    encoder_folder = f"{folder}/text-encoder"
    text_encoder.write_tokenizer(encoder_folder)
    for both in train(teacher, text_encoder.new(), text_encoder.Reader(encoder_folder), plan, report):
        checkpoints.save(both.network, f"{folder}/{name}-text-teacher.safetensors", MADE, torch.float16)
        text_encoder.save(both.encoder, encoder_folder)
