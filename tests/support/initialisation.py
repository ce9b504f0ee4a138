"""How close a new student is to its teacher, before any training, where it reads the teacher's own tokens as data.

    python tests/support/initialisation.py digits-llamagen digits-var
    python tests/support/initialisation.py FOLDER/llamagen-l-cpu.yaml FOLDER/var-d16-cpu.yaml

The last two are files of tests/support/fullsize.py.

Logits are compared where both networks have seen the same: LlamaGen's after the tokens 0 .. i, which the teacher reads
as token i + 1 and the student as token i (the heads shift role); VAR's at the same position of the same scale, where
the teacher has read a map of all earlier scales and the student, in its place, the token itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fullsize
import torch
from torch import Tensor

from pipeline import noise
from pipeline.command_line import parse
from pipeline.models import checkpoints
from pipeline.models.base import Student, Teacher
from pipeline.models.conditions import Condition, Labels
from pipeline.recipe import Recipe

SAMPLES = 8


def students(recipe: Recipe, teacher: Teacher) -> Iterator[tuple[str, Student]]:
    """The student as distill starts it, and as it would be otherwise."""
    asked = recipe.train.student_options
    student = checkpoints.new_student(recipe.teacher, teacher, asked, recipe.train.seed).eval()
    yield "from its teacher", student
    if hasattr(teacher.network, "tok_embeddings"):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            student.tok_embeddings.weight.normal_(std=0.02, generator=generator)
            student.tok_embeddings.bias.zero_()
        yield "with a random input layer, as released", student
    torch.manual_seed(0)
    kind, options = checkpoints.family(recipe.teacher).Student, checkpoints.student_options(recipe.teacher, asked)
    yield "fresh", kind(checkpoints.config(recipe.teacher), teacher.codebook, **options).eval()


def compared(recipe: Recipe, teacher: Teacher, student: Student, codes: Tensor, condition: Condition) -> list[float]:
    """Correlation of the logits over the codes, KL(teacher, student) in nats, share of equal favourites."""
    layout = teacher.layout
    t = torch.full((len(codes),), layout.steps, dtype=torch.long)
    taught = teacher(condition, codes)
    found = student(teacher.codebook[codes], t, condition).logits
    data = layout.before(layout.steps)
    raster = layout.steps == layout.length
    taught, found = (taught[:, 1:], found[:, :data]) if raster else (taught[:, :data], found[:, :data])
    p, q = taught.log_softmax(-1), found.log_softmax(-1)
    a, b = (x - x.mean(-1, keepdim=True) for x in (taught, found))
    correlation = torch.cosine_similarity(a, b, dim=-1).mean()
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return [correlation.item(), divergence.item(), (taught.argmax(-1) == found.argmax(-1)).float().mean().item()]


@torch.no_grad()
def main(name: str) -> None:
    overlay = Path(name)
    recipe = parse(None, ["--config", str(fullsize.RECIPES / f"{name}.yaml")]) if not overlay.is_file() else None
    recipe = recipe or fullsize.read(overlay.stem.removesuffix("-cpu"), overlay)
    teacher = checkpoints.teacher(recipe.teacher)
    samples = SAMPLES if teacher.layout.length < 200 else 1
    condition = Labels(torch.from_numpy(noise.labels(range(samples), teacher.layout.classes)))
    random = torch.Generator().manual_seed(1)

    def draw(step: int, log_p: Tensor) -> Tensor:
        return torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=random).view(log_p.shape[:-1])

    codes = teacher.generate(condition, draw)
    for kind, student in students(recipe, teacher):
        correlation, divergence, same = compared(recipe, teacher, student, codes, condition)
        print(f"{recipe.name}, {kind}: correlation {correlation:.3f}, KL {divergence:.3f}, same favourite {same:.1%}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
