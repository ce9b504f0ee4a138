"""An image is the same in whatever company it is drawn, and the Generator's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared_student import shared
from tiny import Family, tiny, tiny_text

from pipeline import Generator
from pipeline.host.errors import Refused
from pipeline.sampling.samplers import FlowMatched, Sampler
from pipeline.serving.orders import Sample
from pipeline.serving.painter import Painter, check

LEVELS = 1  # of 255, that rounding may change where the batch has another size


def samples(count: int, steps: tuple[int, ...] = (1,)) -> list[Sample]:
    return [Sample(i % 3, 5 + i // 4, i, steps) for i in range(count)]


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    return Generator.from_pretrained(shared(tiny(tmp_path, "llamagen")).student_uri, "cpu", teacher=True)


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_company_changes_no_bit(tmp_path: Path, family: Family) -> None:
    """On one machine's CPU: alone, in every place of a full batch, and beside samples of other steps."""
    painter = Painter(Generator.from_pretrained(shared(tiny(tmp_path, family)).student_uri, "cpu"), 4)
    mine = samples(1)[0]
    (alone,) = painter.draw([mine])
    others = samples(8)[5:]
    for place in range(4):
        together = painter.draw([*others[:place], mine, *others[place:]])
        assert np.array_equal(together[place].pixels, alone.pixels), place
        assert together[place].company == 4
    mixed = painter.draw([samples(3, (1, 2))[2], mine, others[0]])
    assert np.array_equal(mixed[1].pixels, alone.pixels)
    assert [one.company for one in mixed] == [1, 2, 2], "those of the same steps go together"
    assert not np.array_equal(painter.draw([others[0]])[0].pixels, alone.pixels)


def spied(generator: Generator, monkeypatch: pytest.MonkeyPatch, change: float = 0.0) -> list[int]:
    """The sizes of the batches that are drawn from now on; those of odd ones are changed by ``change``."""
    sizes: list[int] = []
    decoded = generator.decoded

    def spy(sampler: Sampler, wanted: list[int], *args: Any) -> Iterator[torch.Tensor]:
        sizes.append(len(wanted))
        return (one + change * (len(wanted) % 2) for one in decoded(sampler, wanted, *args))

    monkeypatch.setattr(generator, "decoded", spy)
    return sizes


def test_batches_have_the_sizes_that_change_no_bit(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that no pixel shows is enough to leave a size out."""
    sizes = spied(generator, monkeypatch, change=1e-7)
    painter = Painter(generator, 4)
    assert set(sizes) == {1, 2, 3, 4}, "all that there are were tried"
    assert set(painter.sizes) <= {2, 4}
    painter.sizes = [2, 4]
    sizes.clear()
    for count in (1, 2, 3, 4):
        assert [one.size for one in painter.draw(samples(count))] == [sizes[-1]] * count
    painter.draw([*samples(2), *samples(3, (1, 2))[:1]])
    assert sizes == [2, 2, 4, 4, 2, 2]


@pytest.mark.parametrize(("batch", "tried"), [(1, {1}), (2, {1, 2}), (16, {2, 4, 6, 8, 10, 12, 14, 16})])
def test_eighths_of_a_batch_are_tried(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, batch: int, tried: set[int]
) -> None:
    sizes = spied(generator, monkeypatch)
    found = Painter(generator, batch).sizes
    assert set(sizes) == tried
    assert set(found) <= tried
    assert found[-1] == batch
    assert found == sorted(found)


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_images_are_the_generators(generator: Generator, steps: tuple[int, ...]) -> None:
    """Bit for bit those of a batch of the same size, and up to a level those that it draws of one alone."""
    wanted = samples(4, steps)
    found = np.stack([one.pixels for one in Painter(generator, 4).draw(wanted)])
    given = [[getattr(one, name) for one in wanted] for name in ("wanted", "seed", "id")]
    assert np.array_equal(found, generator.draw(given[0], given[1], steps, given[2]))
    alone = torch.cat([generator.draw([one.wanted], [one.seed], steps, [one.id]) for one in wanted])
    assert np.abs(found.astype(int) - alone.numpy().astype(int)).max() <= LEVELS


def test_the_teacher_draws_the_same_noise(generator: Generator) -> None:
    wanted = [Sample(i % 3, 5, i, ()) for i in range(3)]
    found = np.stack([one.pixels for one in Painter(generator, 3, teacher=True).draw(wanted)])
    assert np.array_equal(found, generator.draw_with(FlowMatched(), [0, 1, 2], 5))


def test_prompts_are_drawn(tmp_path: Path) -> None:
    generator = Generator.from_pretrained(shared(tiny_text(tmp_path)).student_uri, "cpu")
    wanted = [Sample(text, 5, i, (1,)) for i, text in enumerate(["zero one", "", "one two zero one two zero"])]
    found = [one.pixels for one in Painter(generator, 4).draw(wanted)]
    alone = [Painter(generator, 4).draw([one])[0].pixels for one in wanted]
    levels = [np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(found, alone, strict=True)]
    assert max(levels) <= LEVELS, "captions are padded to the longest of a batch"


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (Sample(3, 0, 0, (1,)), "label 3 was asked of a student of 3 classes"),
        (Sample("a seven", 0, 0, (1,)), "'a seven' was asked of a student that takes labels"),
        (Sample(1, 0, 0, (2,)), "must rise, begin with 1"),
        (Sample(1, 0, 0, (1, 99)), "end by 9"),
    ],
)
def test_what_the_student_lacks_is_refused(generator: Generator, sample: Sample, sentence: str) -> None:
    check(generator.description, generator.layout, samples(2))
    check(generator.description, generator.layout, [Sample(1, 0, 0, ())])  # of the teacher, which takes all its steps
    with pytest.raises(Refused, match=sentence):
        check(generator.description, generator.layout, [*samples(1), sample])


@pytest.mark.parametrize("batch", [0, 65])
def test_a_batch_is_no_larger_than_the_generators(generator: Generator, batch: int) -> None:
    with pytest.raises(Refused, match=f"--batch is {batch}; it must be from 1 to 64"):
        Painter(generator, batch)
