"""The kernel of flow/kernel.py on CPU tensors, in Triton's interpreter: run by tests/flow/test_kernel.py.

The interpreter is chosen when triton is imported, for the whole process, so these tests have a process of their own:
TRITON_INTERPRET=1 python -m pytest tests/support/interpreted.py. A token takes a tenth of a second and more.
"""

import math

import passes
import pytest
import torch
from torch import Tensor

from pipeline.flow import kernel, matching, oracle, posterior, solvers
from pipeline.flow.matching import Matcher, Solver

# numpy warns of what the kernel computes for bad tokens, and of the step after the last one.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that few codes fill several; `plain` goes around the kernel."""
    monkeypatch.setattr(matching, "has_kernel", lambda codebook, solver: solver.name == "adaptive")
    monkeypatch.setattr(kernel, "PART", 256)
    monkeypatch.setattr(kernel, "PARTS", 4)
    monkeypatch.setattr(kernel, "LIST", 128)


def plain(noise: Tensor, log_p: Tensor, codebook: Tensor, solver: Solver = matching.ADAPTIVE) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "has_kernel", lambda codebook, solver: False)
        return matching.match_counted(noise, log_p, codebook, solver)


def case(codes: int, dimension: int, tokens: int, kept: int | None = None, sharpness: float = 2.0) -> list[Tensor]:
    """noise, log_p (the best `kept` codes, or all) and codebook."""
    random = torch.Generator().manual_seed(codes + dimension)
    codebook = torch.randn(codes, dimension, generator=random)
    logits = sharpness * torch.randn(tokens, codes, generator=random)
    if kept:
        logits = logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -math.inf)
    return [torch.randn(tokens, dimension, generator=random), logits.log_softmax(-1), codebook]


def assert_as_in_torch(noise: Tensor, log_p: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of the torch path; its counts but for the looks that it leaves out, at every other evaluation."""
    (codes, counts), (expected, slower) = matching.match_counted(noise, log_p, codebook), plain(noise, log_p, codebook)
    assert codes.dtype == torch.int64
    assert counts.dtype == torch.float32
    assert torch.equal(codes, expected)
    assert set((slower - counts).unique().tolist()) <= {0.0, 1.0}
    return codes, counts


def counted(noise: Tensor, log_p: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, evaluations and passes of the kernel."""
    matcher = Matcher(codebook)
    found = kernel.solve_counted(noise, log_p, matcher.padded, matcher.solver.tolerance, matcher.flags)
    matcher.check()
    return found


def passes_of(noise: Tensor, log_p: Tensor, codebook: Tensor) -> Tensor:
    return counted(noise, log_p, codebook)[2]


@pytest.mark.parametrize(
    ("codes", "dimension", "tokens", "kept"),
    [(24, 3, 6, None), (300, 5, 5, 70), (1024, 32, 5, 200), (260, 8, 4, None), (129, 3, 3, None)],
)
def test_codes_and_counts_are_those_of_torch_and_of_the_oracle(
    codes: int, dimension: int, tokens: int, kept: int | None
) -> None:
    """V and C that are no powers of two, filtered and not; the last tile is whole, part full or holds one code."""
    given = case(codes, dimension, tokens, kept)
    found, _ = assert_as_in_torch(*given)
    assert torch.equal(found, oracle.exact(*given))


def test_every_step_ends_where_it_does_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off early, the code nearest to y / u on a fine grid is a measurement of y; large steps, so that all terms
    of the method count."""
    monkeypatch.setattr(posterior, "EXIT_WEIGHT", 2.0)
    monkeypatch.setattr(kernel, "PART", 2048)
    monkeypatch.setattr(kernel, "LIST", 8192)
    codebook, solver = torch.linspace(-1, 1, 8192)[:, None], Solver(tolerance=0.1)
    noise, log_p = torch.tensor([[-0.8], [0.1], [1.5]]), (2 * torch.cos(9 * codebook[:, 0])).expand(3, -1)
    for steps in (1, 2, 6):
        monkeypatch.setattr(solvers, "MAX_STEPS", steps)
        found, (expected, _) = matching.match(noise, log_p, codebook, solver), plain(noise, log_p, codebook, solver)
        assert (found - expected).abs().max() <= 1, "a corrector of 1/13 instead of 1/12 moves it by 4"


def test_the_filter_may_cut_anywhere() -> None:
    """Survivors at the borders of tiles of 128 and 64 only, none in the first tile, all in the last, one alone."""
    noise, log_p, codebook = case(300, 16, 7)
    alive = torch.zeros(7, 300, dtype=torch.bool)
    alive[0, [0, 127, 128, 255, 256, 299]] = True
    alive[1, 128:] = True
    alive[2, 256:] = True
    alive[3, ::64] = True
    alive[4, 299], alive[5, 0], alive[6, 128] = True, True, True
    log_p = log_p.masked_fill(~alive, -math.inf) - 1000  # not normalised either
    codes, counts = assert_as_in_torch(noise, log_p, codebook)
    assert alive[range(7), codes].all()
    assert codes[4:].tolist() == [299, 0, 128]
    assert counts[4:].tolist() == [2.5, 2.5, 2.5]


def test_survivors_far_from_the_middle_of_the_codebook() -> None:
    """Their spread, and not their distance, sets the first step."""
    noise, log_p, codebook = case(60, 8, 2)
    codebook = 0.1 * codebook + 10 * (torch.arange(60) < 30)[:, None]
    assert_as_in_torch(noise, log_p.index_fill(1, torch.arange(30, 60), -math.inf), codebook)


def test_of_equal_codes_the_first_is_taken() -> None:
    """A token between two equal codes is never decided: it is read off after the last step, before u overflows."""
    noise, log_p, codebook = case(50, 16, 1)
    codes, counts = assert_as_in_torch(noise, log_p.repeat(1, 2), codebook.repeat(2, 1))
    assert (codes < 50).all()
    assert counts.tolist() == [65.5]


def test_a_token_stops_when_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(64, 8, 4)
    codes, counts = matching.match_counted(*given)
    monkeypatch.setattr(posterior, "EXIT_WEIGHT", 2.0)
    monkeypatch.setattr(solvers, "MAX_STEPS", 24)
    all_codes, all_counts = assert_as_in_torch(*given)
    assert torch.equal(codes, all_codes)
    assert all_counts.unique().tolist() == [25.5]
    assert counts.unique().numel() > 2, "each at its own pace"
    assert counts.max() < 24


def test_striking_codes_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sharp p nearly all codes go, which saves passes; a LOST that is far too high changes codes."""
    monkeypatch.setattr(kernel, "LIST", 512)  # a list in one pass, of what takes four
    noise, log_p, codebook = case(400, 8, 2, sharpness=10.0)
    codes, counts = assert_as_in_torch(noise, log_p, codebook)
    few = passes_of(noise, log_p, codebook)
    monkeypatch.setattr(kernel, "LOST", 0.0)
    whole, whole_counts = matching.match_counted(noise, log_p, codebook)
    assert torch.equal(codes, whole)
    assert torch.equal(counts, whole_counts)
    assert (passes_of(noise, log_p, codebook) > few).all()
    monkeypatch.setattr(kernel, "LOST", 50.0)
    assert not torch.equal(matching.match(noise, log_p, codebook), codes)


@pytest.mark.parametrize("kept", [None, 100], ids=["whole", "listed"])
def test_all_codes_equally_likely(kept: int | None) -> None:
    """Nothing is struck off at first: all rows are streamed, from the codebook or a list."""
    noise, log_p, codebook = case(260, 8, 2, kept)
    assert_as_in_torch(noise, log_p.masked_fill(log_p > -math.inf, 0), codebook)


def test_codes_that_nearly_coincide() -> None:
    """Pairs of them stay undecided for long, at exponents so large that rounding is more than a nat."""
    noise, log_p, codebook = case(70, 8, 2)
    near = torch.cat([codebook, codebook + 1e-2 * torch.randn(70, 8, generator=torch.Generator().manual_seed(1))])
    _, counts = assert_as_in_torch(noise, torch.cat([log_p, log_p.flip(0)], 1), near)
    assert counts.min() > 12


def test_company_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory the tokens before it leave behind, a token's evaluations and passes are its own."""
    tokens = [*zip(*case(300, 5, 2, 100)[:2], strict=True), *zip(*case(300, 5, 2, sharpness=5.0)[:2], strict=True)]
    codebook = case(300, 5, 1)[2]
    noise, log_p = (torch.stack(part) for part in zip(*tokens, strict=True))
    alone = [counted(x[None], p[None], codebook) for x, p in tokens]
    for programs, order in ((1, [3, 1, 0, 2]), (3, [2, 0, 1, 3])):
        monkeypatch.setattr(kernel, "at_once", lambda device, programs=programs: programs)
        for together, apart in zip(
            counted(noise[order], log_p[order], codebook), zip(*alone, strict=True), strict=True
        ):
            assert torch.equal(together, torch.cat(apart)[order])


@pytest.mark.parametrize("name", passes.LIKE)
def test_the_model_counts_the_passes_of_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens of full size, on the kernel's own tiles; and the codes are those of torch."""
    monkeypatch.setattr(kernel, "PART", 2048)
    monkeypatch.setattr(kernel, "PARTS", 8)
    monkeypatch.setattr(kernel, "LIST", 4096)
    recipe = passes.LIKE[name]
    assert (passes.LOST, passes.TILE, passes.LIST) == (kernel.LOST, kernel.PART * kernel.PARTS, kernel.LIST)
    noise, log_p, codebook = passes.like(recipe, 2)
    seen = [passes.watch(x, p, codebook) for x, p in zip(noise, log_p, strict=True)]
    codes, counts, made = counted(noise, log_p, codebook)
    assert made.tolist() == [passes.passes(token, recipe.dimension)[0] for token in seen]
    assert counts.tolist() == [len(token) + 0.5 for token in seen]
    assert torch.equal(codes, plain(noise, log_p, codebook)[0])


def test_types_strides_and_launches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, log_p, codebook = case(90, 4, 3, 40)
    codes, counts = assert_as_in_torch(noise, log_p, codebook)
    wide, shifted = torch.zeros(3, 200), torch.zeros(90, 7, 4)
    wide[:, 100:190], shifted[:, 3] = log_p, codebook
    monkeypatch.setattr(kernel, "at_once", lambda device: 1)  # one program takes all tokens, in the same memory
    found, again = matching.match_counted(noise.double(), wide[:, 100:190], shifted[:, 3])
    assert torch.equal(found, codes)
    assert torch.equal(again, counts)
    turned = noise.T.contiguous().T.view(3, 1, 4), log_p.T.contiguous().T.view(3, 1, 90)
    assert torch.equal(matching.match(*turned, codebook), codes.view(3, 1))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = log_p[:2].to(dtype)
        assert torch.equal(matching.match(noise[:2], rounded, codebook), plain(noise[:2], rounded.float(), codebook)[0])
    assert matching.match(noise[:0], log_p[:0], codebook).shape == (0,)


def test_a_matcher_goes_on_until_it_is_asked() -> None:
    """Bad tokens get code 0 and disturb no other; the first of torch's messages is raised, as often as it is asked."""
    noise, log_p, codebook = case(140, 4, 3, 5)
    codes, hole, peak, empty, far = (
        matching.match(noise, log_p, codebook),
        *(log_p.clone() for _ in range(3)),
        noise.clone(),
    )
    hole[1, 139], peak[1, 5], empty[1], far[1, 3] = math.nan, math.inf, -math.inf, math.inf
    sound = torch.tensor([0, 2])
    for x, p, message in (
        (noise, hole, r"log_p holds NaN or \+inf"),
        (noise, peak, r"log_p holds NaN or \+inf"),
        (noise, empty, "-inf for all codes of a token"),
        (far, log_p, "noise holds NaN or infinity"),
        (noise * math.nan, empty, "noise holds NaN or infinity"),
    ):
        matcher = Matcher(codebook)
        matcher.check()
        found, counts = matcher.counted(x, p)
        assert found[1] == counts[1] == 0
        if torch.equal(x[0], noise[0]):
            assert torch.equal(found[sound], codes[sound])
        matcher(noise[:1], log_p[:1])  # what was met is not forgotten
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                matcher.check()
        with pytest.raises(ValueError, match=message):
            matching.match(x[1:2], p[1:2], codebook)


def test_what_overflows_ends_in_the_codebook() -> None:
    noise, log_p, codebook = case(30, 4, 2)
    codes = Matcher(codebook)(noise * 1e38, log_p)
    assert ((codes >= 0) & (codes < 30)).all()


def test_other_solvers_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, log_p, codebook = case(30, 4, 2)
    monkeypatch.setattr(kernel, "solve", None)
    for solver in (Solver("fixed"), Solver("paper")):
        assert matching.match(noise, log_p, codebook, solver).shape == (2,)
