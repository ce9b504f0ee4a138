"""Every sampler against a slow implementation of its own, one sample and one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import noise
from pipeline.flow import matching, oracle
from pipeline.models.base import Choose, Layout, Prediction, Student, Teacher, Tokenizer, nearest
from pipeline.models.conditions import Condition, Labels
from pipeline.sampling import samplers, selection
from pipeline.sampling.samplers import (
    Autoregressive,
    FewStep,
    FlowMatched,
    Models,
    OneStepStar,
    Sampler,
    Skip,
    WithTeacher,
    inverse_cdf,
)

LAYOUT = Layout(groups=(1, 2, 3), vocabulary=7, code_dim=2, classes=3, image_size=8)
SEED = 11
IDS = np.array([4, 0, 17, 5, 6])


class TinyTokenizer(Tokenizer):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randn(7, 2, generator=generator))

    @property
    def codebook(self) -> Tensor:
        return self.codes


class TinyTeacher(Teacher):
    """log p of a token from its place, the label and the sum of the codes before its step; code 3 never
    occurs.
    """

    layout = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = TinyTokenizer()
        self.stops: list[tuple[int, int]] = []

    def log_p(self, labels: Tensor, before: Tensor, t: int) -> Tensor:
        places = torch.arange(6)[LAYOUT.span(t)]
        k = torch.arange(7)
        phase = labels[:, None, None] + 0.7 * before.sum(1)[:, None, None] + places[:, None] * (k + 1)
        logits = 2 * torch.sin(phase.float())
        logits[..., 3] = -torch.inf
        return logits.log_softmax(-1)

    def generate(
        self, condition: Condition, choose: Choose, prefix: Tensor | None = None, stop: int | None = None
    ) -> Tensor:
        first, end = self.span(prefix, stop)
        self.stops.append((first, end))
        codes = prefix if prefix is not None else torch.empty(len(condition), 0, dtype=torch.long)
        for t in range(first, end):
            codes = torch.cat([codes, choose(t, self.log_p(condition.labels, codes, t))], 1)
        return codes


class TinyStudent(Student):
    """A fixed random function of X_t, t and the label."""

    layout = LAYOUT

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.calls: list[int] = []
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Linear(2 * 6 + 2, 6 * 9)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.calls.append(int(t[0]))
        extra = torch.stack([t.float(), condition.labels.float()], 1)
        out = self.net(torch.cat([x_t.flatten(1), extra], 1)).view(-1, 6, 9)
        return Prediction(out[..., :7], out[..., 7:])


def models(**changes: Any) -> Models:
    teacher = TinyTeacher()
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 4, (3, 6, 7), generator=generator).float() + torch.eye(7)[:6]
    base = {"student": TinyStudent(teacher.codebook), "frequencies": counts}
    return Models(teacher=teacher, solver=matching.Solver(), seed=SEED, **(base | changes))


# ---- slow implementations: one sample, one token, plain loops


def slow_code(log_p: Tensor, u: float) -> int:
    """The inverse CDF by hand."""
    p, total = log_p.double().exp(), 0.0
    for code, value in enumerate(p / p.sum()):
        total += float(value)
        if total > u:
            return code
    raise AssertionError("u is beyond the last code")


class Slow:
    """The samplers for one id."""

    def __init__(self, using: Models, identity: int) -> None:
        self.teacher, self.student = using.teacher, using.student
        self.codebook, self.counts = using.teacher.codebook, using.frequencies
        self.label = torch.tensor([identity % 3])
        self.noise = torch.from_numpy(noise.gaussian(SEED, [identity], 6, 2)[0]).float()
        self.u = noise.uniform(SEED, [identity], 6)[0]

    def teacher_codes(self, codes: list[int], first: int, end: int) -> list[int]:
        for t in range(first, end):
            log_p = self.teacher.log_p(self.label, torch.tensor([codes], dtype=torch.long), t)[0]
            places = range(6)[LAYOUT.span(t)]
            codes = codes + [slow_code(row, self.u[i]) for row, i in zip(log_p, places, strict=True)]
        return codes

    def jump(self, x: Tensor, t: int, split: int) -> Tensor:
        kept, coded = LAYOUT.before(t), LAYOUT.before(split + 1)
        x_t = torch.stack([x[i] if i < kept else self.noise[i] for i in range(6)])
        logits, embeddings = self.student(x_t[None], torch.tensor([t]), Labels(self.label))
        out = []
        for i in range(6):
            if i < coded and i < kept:
                distance = (self.codebook - x[i]).square().sum(1)
                out.append(self.codebook[distance.argmin()])
            elif i < coded:
                out.append(self.codebook[logits[0, i].argmax()])
            else:
                out.append(x[i] if i < kept else embeddings[0, i])
        return torch.stack(out)

    def few_step(self, steps: tuple[int, ...], split: int) -> Tensor:
        x = self.noise
        for t in steps:
            x = self.jump(x, t, split)
        return x

    def with_teacher(self, start: int, resume: int, split: int) -> Tensor:
        codes: list[int] = []
        if start > 1:
            x = self.jump(self.noise, 1, split)
            codes = [int((self.codebook - x[i]).square().sum(1).argmin()) for i in range(LAYOUT.before(start))]
        codes = self.teacher_codes(codes, start, resume)
        x = torch.stack([self.codebook[codes[i]] if i < len(codes) else self.noise[i] for i in range(6)])
        return self.jump(x, resume, split) if resume <= 3 else x

    def skip(self, n: int) -> Tensor:
        codes = self.teacher_codes([], 1, 4 - n)
        return torch.stack([self.codebook[codes[i]] if i < len(codes) else torch.zeros(2) for i in range(6)])

    def one_step_star(self, given_class: bool) -> Tensor:
        counts = self.counts[self.label[0]] if given_class else self.counts.sum(0)
        return torch.stack([self.codebook[slow_code(counts[i].log(), self.u[i])] for i in range(6)])

    def flow_matched(self) -> Tensor:
        codes: list[int] = []
        for t in range(1, 4):
            log_p = self.teacher.log_p(self.label, torch.tensor([codes], dtype=torch.long), t)[0]
            codes += oracle.exact(self.noise[LAYOUT.span(t)], log_p, self.codebook).tolist()
        return self.codebook[codes]


CASES: list[tuple[Sampler, Any, int]] = [
    (FewStep(2), lambda one: one.few_step((1,), 2), 1),
    (FewStep(0, (1, 3)), lambda one: one.few_step((1, 3), 0), 2),
    (FewStep(3, (1, 2, 3)), lambda one: one.few_step((1, 2, 3), 3), 3),
    (WithTeacher(2, 3, 1), lambda one: one.with_teacher(2, 3, 1), 3),
    (WithTeacher(1, 3, 3), lambda one: one.with_teacher(1, 3, 3), 3),
    (WithTeacher(2, 4, 0), lambda one: one.with_teacher(2, 4, 0), 3),
    (WithTeacher(1, 4, 2), lambda one: one.with_teacher(1, 4, 2), 3),
    (Autoregressive(), lambda one: one.codebook[one.teacher_codes([], 1, 4)], 3),
    (FlowMatched(), lambda one: one.flow_matched(), 3),
    (Skip(1), lambda one: one.skip(1), 2),
    (Skip(2), lambda one: one.skip(2), 1),
    (OneStepStar(), lambda one: one.one_step_star(False), 1),
    (OneStepStar(True), lambda one: one.one_step_star(True), 1),
]


@pytest.mark.parametrize(("sampler", "slow", "steps"), CASES, ids=lambda case: getattr(case, "name", None))
def test_samplers_equal_their_slow_implementations(sampler: Sampler, slow: Any, steps: int) -> None:
    using = models()
    sampler.check(LAYOUT)
    found = sampler.draw(using, IDS)
    assert found.shape == (5, 6, 2)
    assert found.dtype == torch.float32
    with torch.no_grad():
        expected = torch.stack([slow(Slow(using, int(i))) for i in IDS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert sampler.steps_label(LAYOUT) == steps


def test_samples_do_not_depend_on_their_batch() -> None:
    for sampler, _, _ in CASES:
        whole = sampler.draw(models(), IDS)
        parts = [sampler.draw(models(), IDS[i : i + 2]) for i in range(0, 5, 2)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-6)


def test_all_tokens_from_the_teacher_is_the_teacher() -> None:
    """pre-trained-1-(last + 1) is plain AR sampling: no jump, the same uniform draws."""
    using = models()
    assert torch.equal(WithTeacher(1, 4, 2).draw(using, IDS), Autoregressive().draw(using, IDS))
    assert using.student is not None
    assert using.student.calls == []


def test_the_teacher_draws_only_what_it_must() -> None:
    using = models()
    WithTeacher(2, 3, 1).draw(using, IDS)
    Skip(2).draw(using, IDS)
    assert using.teacher.stops == [(2, 3), (1, 2)]
    assert using.student.calls == [1, 3]


def test_flow_matching_uses_the_noise_that_the_student_gets() -> None:
    using = models()
    seen = using.inputs(IDS)
    codes = nearest(FlowMatched().draw(using, IDS), using.teacher.codebook)
    log_p = using.teacher.log_p(seen.condition.labels, codes[:, :0], 1)
    assert torch.equal(codes[:, :1], matching.match(seen.noise[:, :1], log_p, using.teacher.codebook))
    assert seen.condition.labels.tolist() == [1, 0, 2, 2, 0]


# ---- the inverse CDF


def test_inverse_cdf_draws_with_the_given_frequencies() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    codes = inverse_cdf((3 * p).log().expand(10_000, 6), u)
    assert torch.bincount(codes, minlength=6).tolist() == [0, 5_000, 0, 2_000, 3_000, 0]


def test_inverse_cdf_never_draws_an_impossible_code() -> None:
    log_p = torch.full((4, 5), -torch.inf)
    log_p[:, 1] = 0.0
    log_p[2, 3] = -60.0  # possible, but too small to move a float64 sum
    u = torch.tensor([1e-17, 0.5, 1 - 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(log_p, u).tolist() == [1, 1, 1, 1]


def test_inverse_cdf_in_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    log_p, u = torch.randn(4, 9, 7, generator=generator), torch.rand(4, 9, generator=generator).double()
    whole = inverse_cdf(log_p, u)
    monkeypatch.setattr(samplers, "CHUNK", 14)
    assert torch.equal(inverse_cdf(log_p, u), whole)


def test_ar_sampling_has_the_teachers_frequencies() -> None:
    using = models()
    codes = nearest(Autoregressive().draw(using, np.arange(6_000)), using.teacher.codebook)
    labels = torch.arange(6_000) % 3
    for label in range(3):
        p = using.teacher.log_p(torch.tensor([label]), torch.empty(1, 0), 1)[0, 0].exp()
        found = torch.bincount(codes[labels == label, 0], minlength=7) / 2_000
        assert (found - p).abs().max() < 0.04
        assert found[3] == 0


@pytest.mark.parametrize("given_class", [False, True])
def test_one_step_star_is_the_same_however_many_positions_fit_at_once(
    given_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    using, ids = models(), np.arange(8)  # 6 positions, 7 codes
    whole = OneStepStar(given_class).draw(using, ids)
    for positions in (0, 1, 4):
        monkeypatch.setattr(samplers, "CHUNK", positions * 8 * 7)
        assert torch.equal(OneStepStar(given_class).draw(using, ids), whole)


@pytest.mark.parametrize("given_class", [False, True])
def test_one_step_star_has_the_pair_sets_frequencies(given_class: bool) -> None:
    using = models()
    assert using.frequencies is not None
    codes = nearest(OneStepStar(given_class).draw(using, np.arange(6_000)), using.teacher.codebook)
    mine = codes[torch.arange(6_000) % 3 == 1]
    counts = using.frequencies[1] if given_class else using.frequencies.sum(0)
    for i in range(6):
        found = torch.bincount(mine[:, i], minlength=7) / len(mine)
        assert (found - counts[i] / counts[i].sum()).abs().max() < 0.04


# ---- recipes


def test_a_recipe_lists_samplers_by_name() -> None:
    listed = [
        {"name": "FewStep"},
        {"name": "FewStep", "steps": [1, 3], "split": 1},
        {"name": "WithTeacher", "start": 2, "resume": 3},
        {"name": "Autoregressive"},
        {"name": "FlowMatched"},
        {"name": "Skip", "n": 1},
        {"name": "OneStepStar", "given_class": True},
    ]
    built = selection.build(listed, LAYOUT, split=2)
    assert built == [
        FewStep(2),
        FewStep(1, (1, 3)),
        WithTeacher(2, 3, 2),
        Autoregressive(),
        FlowMatched(),
        Skip(1),
        OneStepStar(True),
    ]
    assert selection.names(built) == [
        "DD 1 step",
        "DD 2 steps (1, 3)",
        "DD pre-trained-2-3",
        "teacher, AR",
        "teacher, FM",
        "skip-1",
        "onestep* given the class",
    ]


def test_figures_of_the_paper_are_no_part_of_a_sampler() -> None:
    figures = {"fid": 9.94, "is": 193.6, "parameters": 327_000_000, "speedup": 6.3}
    listed = [{"name": "FewStep", "paper": figures}, {"name": "Skip", "n": 1}]
    assert selection.build(listed, LAYOUT, split=2) == [FewStep(2), Skip(1)]
    assert selection.published(listed) == [figures, {}]


def test_every_sampler_has_a_type_of_the_papers_tables() -> None:
    assert [(kind.__name__, kind.type) for kind in samplers.SAMPLERS] == [
        ("FewStep", "DD"),
        ("WithTeacher", "DD + AR"),
        ("Autoregressive", "AR"),
        ("FlowMatched", "AR"),
        ("Skip", "baseline"),
        ("OneStepStar", "baseline"),
    ]


def test_samplers_that_differ_in_the_split_are_told_apart() -> None:
    assert selection.names([FewStep(1), FewStep(2), Skip(1)]) == [
        "DD 1 step, split 1",
        "DD 1 step, split 2",
        "skip-1",
    ]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"name": "Magic"}, "needs a name out of FewStep, WithTeacher"),
        ({"steps": [1]}, "needs a name out of"),
        ("FewStep", "needs a name out of"),
        ({"name": "FewStep", "step": [1]}, "FewStep has no field 'step'; it knows split, steps"),
        ({"name": "Autoregressive", "n": 1}, "it knows none besides its name"),
        ({"name": "FewStep", "steps": 1}, "FewStep.steps is 1; it must be a list, each a whole number"),
        ({"name": "FewStep", "steps": [2, 3]}, "begin with 1 and end by 3"),
        ({"name": "FewStep", "steps": [1, 4]}, "begin with 1 and end by 3"),
        ({"name": "FewStep", "steps": [1, 3, 2]}, "they must rise"),
        ({"name": "FewStep", "split": 4}, "split 4; it must be from 0"),
        ({"name": "WithTeacher", "start": 2}, "WithTeacher needs resume"),
        ({"name": "WithTeacher", "start": 3, "resume": 3}, "1 <= start < resume <= 4"),
        ({"name": "WithTeacher", "start": 1, "resume": 5}, "1 <= start < resume <= 4"),
        ({"name": "Skip", "n": 3}, "from 1 to 2"),
        ({"name": "FewStep", "split": None}, "FewStep.split has no value; it must be a whole number"),
        ({"name": ["FewStep"]}, "an entry needs a name out of"),
        ({"name": "Skip", "n": True}, "must be a whole number"),
        ({"name": "OneStepStar", "given_class": 1}, "must be true or false"),
        ({"name": "Skip", "n": 1, "paper": 9.5}, "Skip has paper 9.5; it must hold named figures"),
        ({"name": "Skip", "n": 1, "paper": {"fdi": 9.5}}, "no figure 'fdi' of the paper; it knows fid, is"),
        ({"name": "Skip", "n": 1, "paper": {"fid": "9.5"}}, "the paper's fid '9.5'; it must be a number above 0"),
        ({"name": "Skip", "n": 1, "paper": {"fid": True}}, "it must be a number above 0"),
        ({"name": "Skip", "n": 1, "paper": {"recall": 0}}, "it must be a number above 0"),
    ],
)
def test_a_wrong_entry_is_one_sentence(entry: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        selection.build([entry], LAYOUT, split=2)
    assert "\n" not in str(caught.value)


def test_no_samplers_and_double_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluate\.samplers is empty"):
        selection.build([], LAYOUT, 1)
    with pytest.raises(ValueError, match="twice"):
        selection.build([{"name": "Skip", "n": 1}] * 2, LAYOUT, 1)
    with pytest.raises(ValueError, match="twice"):
        selection.build([{"name": "Skip", "n": 1}, {"name": "Skip", "n": 1, "paper": {"fid": 9.52}}], LAYOUT, 1)


def test_missing_models_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="needs a student"):
        FewStep(1).draw(models(student=None), IDS)
    with pytest.raises(ValueError, match="token frequencies of a pair set"):
        OneStepStar().draw(models(frequencies=None), IDS)
