"""The flow-matching map: python -m pytest tests/flow/test_matching.py (larger samples: -m slow)."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from pipeline.flow import matching, oracle, posterior, solvers
from pipeline.flow.matching import GRIDS, Solver
from pipeline.numerics.precision import full_precision

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "flow.json").read_text())
SOLVERS = [Solver(), Solver("fixed", 10), Solver("fixed", 14), Solver("paper", 10)]
SOUND = SOLVERS[:3]  # of the paper's solver the goldens and the study know that it errs


def by_name(solver: Solver) -> str:
    return solver.name if solver.name == "adaptive" else f"{solver.name}-{solver.evaluations}"


class Case(NamedTuple):
    """A golden case, float64, one row per token."""

    codebook: Tensor
    log_p: Tensor
    noise: Tensor
    tokens: list[dict]

    def column(self, name: str) -> Tensor:
        return torch.tensor([token[name] for token in self.tokens])


def golden_case(name: str) -> Case:
    case = next(case for case in GOLDEN["cases"] if case["name"] == name)
    noise, tokens = torch.tensor(case["eps"], dtype=torch.float64), case["tokens"]
    rows = [token["p"] for token in tokens]
    return Case(
        torch.tensor(case["codebook"], dtype=torch.float64),
        log_probs(case["log_p"])[rows],
        noise[rows, [token["eps"] for token in tokens]],
        tokens,
    )


def log_probs(rows: list[list[float | None]]) -> Tensor:
    """The goldens write -inf as null."""
    return torch.tensor([[-math.inf if v is None else v for v in row] for row in rows], dtype=torch.float64)


CASES = [case["name"] for case in GOLDEN["cases"]]


# ---- the equations


@pytest.mark.parametrize("name", CASES)
def test_posterior_mean_and_velocity_are_the_goldens(name: str) -> None:
    case = next(case for case in GOLDEN["cases"] if case["name"] == name)
    codebook, log_p = torch.tensor(case["codebook"], dtype=torch.float64), log_probs(case["log_p"])
    for point in case["posterior"]:
        x = torch.tensor(point["x"], dtype=torch.float64)
        for function, expected in ((matching.posterior_mean, point["mean"]), (matching.velocity, point["velocity"])):
            found = function(log_p[point["p"]], x, point["t"], codebook)
            assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.9])
def test_velocity_is_the_corrected_equation_3(t: float) -> None:
    random = np.random.default_rng(3)
    codes, p = random.normal(size=(9, 5)) + 1.0, random.dirichlet(np.ones(9))
    p[2] = 0.0
    p /= p.sum()
    x = (1 - t) * random.normal(size=(4, 5)) + t * codes[4:8]
    expected = np.empty_like(x)
    for i in range(4):  # as printed, but for the minus sign and the 2
        w = p * np.exp(-((x[i] - t * codes) ** 2).sum(1) / (2 * (1 - t) ** 2))
        expected[i] = sum(w[j] / w.sum() * (codes[j] - x[i]) / (1 - t) for j in range(9))
    log_p = torch.from_numpy(p).log().expand(4, -1)
    found = matching.velocity(log_p, torch.from_numpy(x), t, torch.from_numpy(codes))
    assert found.dtype == torch.float64
    assert np.allclose(found, expected, rtol=1e-10)
    single = matching.velocity(log_p.float(), torch.from_numpy(x).float(), t, torch.from_numpy(codes).float())
    assert single.dtype == torch.float32
    assert np.allclose(single, expected, rtol=1e-3, atol=1e-4)


def test_the_fixed_grid_of_ten_is_the_golden_one() -> None:
    nodes, predictor, corrector = solvers.adams(10)
    golden = GOLDEN["fixed10_grid"]
    assert nodes == pytest.approx([*golden["nodes"], golden["g"] * golden["end"]])
    for found, expected in zip(
        predictor + corrector, golden["predictor_weights"] + golden["corrector_weights"][1:], strict=True
    ):
        assert found == pytest.approx(expected)


# ---- the codes of the goldens


@pytest.mark.parametrize("name", CASES)
def test_exact_finds_the_golden_codes(name: str) -> None:
    case = golden_case(name)
    assert torch.equal(oracle.exact(case.noise, case.log_p, case.codebook), case.column("exact"))


@pytest.mark.parametrize("solver", SOUND, ids=by_name)
@pytest.mark.parametrize("name", CASES)
def test_solvers_find_the_stable_golden_codes(name: str, solver: Solver) -> None:
    case = golden_case(name)
    codes, stable = matching.match(case.noise, case.log_p, case.codebook, solver), case.column("stable_1e2")
    assert torch.equal(codes[stable], case.column("exact")[stable])
    if solver == Solver("fixed", 10):
        assert torch.equal(codes, case.column("fixed10"))


@pytest.mark.parametrize("name", CASES)
def test_paper_ends_where_the_published_solver_does(name: str) -> None:
    case = golden_case(name)
    block = posterior.OpenTokens(case.log_p, posterior.augment(case.codebook))
    end = case.column("official10_lower_order_last_x").double()
    assert torch.allclose(solvers.dpm_solver(block, case.noise, 10), end, rtol=1e-5, atol=1e-6)
    codes, counts = matching.match_counted(case.noise, case.log_p, case.codebook, Solver("paper"))
    assert torch.equal(codes, case.column("official10_lower_order_last_index"))
    assert counts.unique().tolist() == [10]


# ---- the distribution


def distribution(kind: str, codes: int, seed: int = 5) -> Tensor:
    """Log-probabilities [codes]."""
    logits = torch.randn(codes, generator=torch.Generator().manual_seed(seed))
    if kind == "peaked":
        logits = 4 * logits
    if kind == "truncated":
        logits[logits < logits.median()] = -math.inf
    return (logits if kind != "flat" else 0.05 * logits).log_softmax(0)


@pytest.mark.parametrize("solver", [Solver(), Solver("fixed", 14)], ids=by_name)
@pytest.mark.parametrize("kind", ["peaked", "flat", "truncated"])
def test_codes_have_the_frequencies_p(kind: str, solver: Solver) -> None:
    draws, random = 20_000, torch.Generator().manual_seed(11)
    codebook, log_p = torch.randn(32, 6, generator=random), distribution(kind, 32)
    codes = matching.match(torch.randn(draws, 6, generator=random), log_p.expand(draws, -1), codebook, solver)
    found, expected = np.bincount(codes, minlength=32), draws * log_p.double().softmax(0).numpy()
    assert not found[expected == 0].any()
    rare = expected < 5
    found, expected = (np.append(a[~rare], a[rare].sum()) for a in (found, expected))
    kept = expected > 0
    assert chisquare(found[kept], expected[kept] * draws / expected.sum()).pvalue > 1e-3


# ---- accuracy on codebooks like VAR's and LlamaGen's


class Family(NamedTuple):
    """Tokens of eight distributions: perplexity 5, 60, 300 or 600, nearly flat; with and without geometry."""

    codebook: Tensor
    log_p: Tensor
    noise: Tensor
    codes: Tensor  # exact


def filtered(logits: Tensor, perplexity: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities of a perplexity, after top-k and top-p, by bisection on the temperature."""
    logits = logits.where(logits >= logits.topk(top_k).values[-1], -math.inf)
    low, high = 0.0, 60.0
    for _ in range(30):
        log_p = ((low + high) / 2 * logits).where(logits > -math.inf, logits).log_softmax(0)
        p, order = log_p.exp().sort(descending=True)
        log_p = log_p.index_fill(0, order[p.cumsum(0) - p >= top_p], -math.inf).log_softmax(0)
        broad = torch.special.entr(log_p.exp()).sum() > math.log(perplexity)
        low, high = ((low + high) / 2, high) if broad else (low, (low + high) / 2)
    return log_p


def family(name: str, tokens: int) -> Family:
    codes, dimension, top_k, top_p, middle = {
        "var": (4096, 32, 900, 0.95, 300),
        "llamagen": (16384, 8, 2000, 1.0, 600),
    }[name]
    random = torch.Generator().manual_seed(2024)
    codebook = torch.randn(codes, dimension, generator=random)
    if name == "llamagen":
        codebook /= codebook.norm(dim=-1, keepdim=True)
    rows = []
    for perplexity in (5, 60, middle, 0.9 * top_k if top_p < 1 else 0.98 * top_k):
        logits = torch.randn(codes, generator=random)
        rows.append(filtered(logits, perplexity, top_k, top_p))
        distance = (codebook - codebook[0]).square().sum(-1) / codebook.var(0).sum()
        rows.append(filtered(logits / 10 - distance, perplexity, top_k, top_p))
    noise = torch.randn(8 * tokens, dimension, generator=random)
    truth = [oracle.exact(x, p.expand(tokens, -1), codebook) for x, p in zip(noise.split(tokens), rows, strict=True)]
    order = torch.randperm(8 * tokens, generator=random)
    log_p = torch.stack(rows).repeat_interleave(tokens, 0)
    return Family(codebook, log_p[order], noise[order], torch.cat(truth)[order])


@pytest.fixture(scope="module", params=["var", "llamagen"])
def few(request: pytest.FixtureRequest) -> tuple[str, Family]:
    return request.param, family(request.param, 80)


def wrong(case: Family, solver: Solver) -> float:
    codes, log_p = matching.match(case.noise, case.log_p, case.codebook, solver), case.log_p
    assert (log_p.gather(1, codes[:, None]) > -math.inf).all()
    return 100 * (codes != case.codes).double().mean().item()


def three_sigma(percent: float, tokens: int) -> float:
    return 3 * math.sqrt(percent * (100 - percent) / tokens)


def check_accuracy(name: str, case: Family) -> None:
    """Per cent wrong below the limit, and for the paper's solver as in the study."""
    tokens = len(case.codes)
    for solver, limit in {
        Solver(): 0.2,
        Solver("fixed", 10): {"var": 0.2, "llamagen": 0.6}[name],
        Solver("fixed", 14): 0.2,
    }.items():
        assert wrong(case, solver) <= limit + three_sigma(limit, tokens), by_name(solver)
    expected = {"var": 3.5, "llamagen": 6.8}[name]
    assert wrong(case, Solver("paper")) == pytest.approx(expected, abs=0.5 + three_sigma(expected, tokens))


def test_accuracy(few: tuple[str, Family]) -> None:
    check_accuracy(*few)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var", "llamagen"])
def test_accuracy_on_a_larger_sample(name: str) -> None:
    check_accuracy(name, family(name, 1000))


def test_snapping_to_the_whole_codebook_is_worse(few: tuple[str, Family]) -> None:
    name, case = few
    block = posterior.OpenTokens(case.log_p, posterior.augment(case.codebook))
    x = solvers.dpm_solver(block, case.noise, 10)
    codes = torch.cdist(x, case.codebook).argmin(-1)
    illegal = 100 * (case.log_p.gather(1, codes[:, None]) == -math.inf).double().mean().item()
    found, expected = 100 * (codes != case.codes).double().mean().item(), {"var": 3.5, "llamagen": 7.9}[name]
    assert found == pytest.approx(expected, abs=0.5 + three_sigma(expected, len(codes)))
    assert illegal > 0.5 if name == "llamagen" else illegal < 0.5


@pytest.mark.parametrize("name", CASES[:2])
def test_adaptive_follows_the_ode_to_its_tolerance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tolerance, steps = golden_case(name), 1e-5, 400
    monkeypatch.setattr(posterior, "EXIT_WEIGHT", 2.0)
    monkeypatch.setattr(solvers, "MAX_STEPS", 24)

    class Watched(posterior.OpenTokens):
        def logits(self, y: Tensor, u: Tensor) -> Tensor:
            self.latest = y, u
            return super().logits(y, u)

    block, reference = (kind(case.log_p, posterior.augment(case.codebook)) for kind in (Watched, posterior.OpenTokens))
    solvers.adaptive(block, case.noise, tolerance)
    found, u = block.latest
    y, h = case.noise, u / steps  # Runge and Kutta's method of order 4 to where the solver got
    for step in range(steps):
        k1 = reference.evaluate(y, step * h)[1]
        k2 = reference.evaluate(y + h / 2 * k1, (step + 0.5) * h)[1]
        k3 = reference.evaluate(y + h / 2 * k2, (step + 0.5) * h)[1]
        k4 = reference.evaluate(y + h * k3, (step + 1) * h)[1]
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert u.min() > 0.5
    assert (found - y).square().mean(-1).sqrt().mean() < 0.5 * tolerance


def test_adaptive_spends_less_on_an_easier_tolerance(few: tuple[str, Family]) -> None:
    name, case = few
    means = [
        matching.match_counted(case.noise, case.log_p, case.codebook, Solver(tolerance=tolerance))[1].mean().item()
        for tolerance in (6e-3, 1e-3, 2e-4)
    ]
    assert means == sorted(means)
    assert means[1] < {"var": 11, "llamagen": 16.5}[name]


# ---- what must not matter


def tokens_with_ragged_support(tokens: int = 96, codes: int = 1500, dimension: int = 8) -> Family:
    """Supports from one code to all of them, so that both ways of the solver are taken."""
    random = torch.Generator().manual_seed(7)
    codebook = torch.randn(codes, dimension, generator=random)
    log_p = 2 * torch.randn(tokens, codes, generator=random)
    for row in range(tokens):
        dead = torch.randperm(codes, generator=random)[int(codes ** (row % 12 / 11)) :]
        log_p[row, dead] = -math.inf
    return Family(codebook, log_p.log_softmax(-1), torch.randn(tokens, dimension, generator=random), torch.empty(0))


@pytest.mark.parametrize("solver", SOLVERS, ids=by_name)
def test_any_split_of_the_batch_gives_the_same_codes(solver: Solver) -> None:
    codebook, log_p, noise, _ = tokens_with_ragged_support()
    widths = {width for _, width in posterior.portions(log_p, codebook.shape[1])}
    assert None in widths
    assert len(widths) > 3
    whole = matching.match(noise, log_p, codebook, solver)
    for size in (1, 7, 64):
        parts = [
            matching.match(x, p, codebook, solver) for x, p in zip(noise.split(size), log_p.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(1))
    assert torch.equal(matching.match(noise[order], log_p[order], codebook, solver), whole[order])


@pytest.mark.parametrize("solver", SOLVERS, ids=by_name)
def test_gathering_survivors_changes_nothing(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, log_p, noise, _ = tokens_with_ragged_support()
    monkeypatch.setattr(posterior, "GATHER_BELOW", 0)
    dense, dense_counts = matching.match_counted(noise, log_p, codebook, solver)
    monkeypatch.setattr(posterior, "GATHER_BELOW", 10**6)
    gathered, gathered_counts = matching.match_counted(noise, log_p, codebook, solver)
    assert torch.equal(gathered, dense)
    assert torch.allclose(gathered_counts, dense_counts, atol=2)  # a rounding may move an exit by one look


@pytest.mark.parametrize("solver", SOUND, ids=by_name)
def test_early_exit_changes_no_code(solver: Solver, few: tuple[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    _, case = few
    some = slice(0, 320)
    codes, counts = matching.match_counted(case.noise[some], case.log_p[some], case.codebook, solver)
    monkeypatch.setattr(posterior, "EXIT_WEIGHT", 2.0)
    monkeypatch.setattr(solvers, "MAX_STEPS", 40)
    slow, all_counts = matching.match_counted(case.noise[some], case.log_p[some], case.codebook, solver)
    assert torch.equal(codes, slow)
    assert counts.mean() < 0.9 * all_counts.mean()


@pytest.mark.parametrize("solver", SOUND, ids=by_name)
def test_a_weight_that_starts_high_is_no_exit(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    codebook = torch.randn(64, 6, generator=random)
    p = torch.full((64,), 0.05 / 63)
    p[5] = 0.95
    noise, log_p = torch.randn(2000, 6, generator=random), p.log().expand(2000, -1)
    codes = matching.match(noise, log_p, codebook, solver)
    assert (codes != 5).double().mean() == pytest.approx(0.05, abs=0.015)
    monkeypatch.setattr(posterior, "EXIT_WEIGHT", 2.0)
    assert torch.equal(matching.match(noise, log_p, codebook, solver), codes)


@pytest.mark.parametrize("solver", SOUND, ids=by_name)
def test_scale_shift_and_rotation_of_the_codebook_do_not_matter(solver: Solver) -> None:
    random = torch.Generator().manual_seed(8)
    codebook, noise = torch.randn(256, 6, generator=random), torch.randn(300, 6, generator=random)
    codebook = (64 * codebook).round() / 64  # the largest shift loses none of these digits
    log_p = (2 * torch.randn(300, 256, generator=random)).log_softmax(-1)
    codes = matching.match(noise, log_p, codebook, solver)
    for scale, shift in ((0.05, 0.0), (8.0, 5.0), (1e-9, 0.0), (1.0, 2.0**14)):
        assert torch.equal(matching.match(noise, log_p, scale * codebook + shift, solver), codes)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=random))[0]
    assert torch.equal(matching.match(noise @ turn, log_p, codebook @ turn, solver), codes)


@pytest.mark.parametrize("solver", SOLVERS, ids=by_name)
def test_a_large_call_is_solved_in_small_blocks(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, log_p, noise, _ = tokens_with_ragged_support()
    whole, budget, sizes = matching.match(noise, log_p, codebook, solver), 200_000, []
    monkeypatch.setitem(posterior.BLOCK_BYTES, "cpu", budget)

    class Watched(posterior.OpenTokens):
        def project(self, query: Tensor, onto: Tensor) -> Tensor:
            own = 0 if self.places is None else self.codes.numel()
            sizes.append(4 * (own + 3 * self.log_p.numel()))
            return super().project(query, onto)

    monkeypatch.setattr(matching, "OpenTokens", Watched)
    assert torch.equal(matching.match(noise, log_p, codebook, solver), whole)
    assert max(sizes) <= budget
    assert max(sizes) > budget / 2  # not needlessly small


def test_types_and_global_settings_do_not_matter() -> None:
    random = torch.Generator().manual_seed(6)
    codebook, noise = torch.randn(256, 8, generator=random), torch.randn(1000, 8, generator=random).half()
    log_p = (2 * torch.randn(1000, 256, generator=random)).log_softmax(-1).half()
    codes = matching.match(noise.float(), log_p.float(), codebook)
    assert codes.dtype == torch.int64
    assert torch.equal(matching.match(noise, log_p, codebook.double()), codes)
    with torch.autocast("cpu", torch.bfloat16):  # would change about 14 codes
        assert torch.equal(matching.match(noise, log_p, codebook), codes)
        assert (noise.float() @ codebook.T).dtype == torch.bfloat16
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("solver", SOLVERS, ids=by_name)
def test_shapes_and_normalisation_do_not_matter(solver: Solver) -> None:
    case = golden_case("l2_64x8")
    noise, log_p, kept = case.noise.float(), case.log_p.float(), case.log_p.clone()
    flat = matching.match(noise, log_p, case.codebook, solver)
    assert torch.equal(
        matching.match(noise.view(5, 6, 8), (log_p - 7).view(5, 6, 64), case.codebook, solver), flat.view(5, 6)
    )
    assert matching.match(noise[0], log_p[0], case.codebook, solver) == flat[0]
    codes, counts = matching.match_counted(noise[:0], log_p[:0], case.codebook, solver)
    assert codes.shape == counts.shape == (0,)
    assert oracle.exact(noise[:0], log_p[:0], case.codebook).shape == (0,)
    assert torch.equal(case.log_p, kept)  # the caller's tensors are untouched


@pytest.mark.parametrize("solver", SOLVERS, ids=by_name)
def test_a_matcher_serves_many_calls(solver: Solver) -> None:
    case = golden_case("l2_64x8")
    matcher, other = (
        matching.Matcher(case.codebook, solver),
        matching.match_counted(*case[2:0:-1], case.codebook, solver),
    )
    for a, b in zip(matcher.counted(case.noise, case.log_p), other, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(matcher(case.noise[:7], case.log_p[:7]), other[0][:7])
    with pytest.raises(ValueError, match="noise holds NaN"):  # at once, where no device is waited for
        matcher(case.noise * math.nan, case.log_p)
    matcher.check()
    with pytest.raises(ValueError, match="codebook holds NaN"):
        matching.Matcher(case.codebook / 0, solver)


# ---- difficult tokens


@pytest.mark.parametrize("solver", [*SOLVERS, None], ids=lambda s: by_name(s) if s else "exact")
def test_zero_probabilities_and_single_survivors(solver: Solver | None) -> None:
    random = torch.Generator().manual_seed(9)
    codebook, noise = torch.randn(40, 3, generator=random), 3 * torch.randn(200, 3, generator=random)
    log_p = torch.full((200, 40), -math.inf)
    for row in range(200):
        log_p[row, torch.randperm(40, generator=random)[: 1 + row % 3]] = torch.randn((), generator=random)
    codes = matching.match(noise, log_p, codebook, solver) if solver else oracle.exact(noise, log_p, codebook)
    assert (log_p.gather(1, codes[:, None]) > -math.inf).all()
    assert torch.equal(codes[::3], log_p[::3].argmax(-1))


@pytest.mark.parametrize("gathered", [False, True])
def test_a_coarse_path_still_ends_in_the_support(gathered: bool) -> None:
    random = torch.Generator().manual_seed(9)
    codebook = torch.nn.functional.normalize(torch.randn(40, 3, generator=random), dim=-1)
    noise, log_p = torch.randn(400, 3, generator=random), torch.randn(400, 40, generator=random)
    log_p = log_p.masked_fill(torch.rand(400, 40, generator=random) < 0.7, -math.inf)
    block = posterior.OpenTokens(log_p, posterior.augment(codebook), 32 if gathered else None)
    solvers.paper(block, noise, 2)
    assert (log_p.gather(1, block.answer[:, None]) > -math.inf).all()
    nearest = torch.cdist(
        solvers.dpm_solver(posterior.OpenTokens(log_p, posterior.augment(codebook)), noise, 2), codebook
    ).argmin(-1)
    assert (log_p.gather(1, nearest[:, None]) == -math.inf).any()  # the test has something to find


@pytest.mark.parametrize("solver", [*SOLVERS, None], ids=lambda s: by_name(s) if s else "exact")
def test_coinciding_codes_share_their_tokens_without_harm(solver: Solver | None) -> None:
    random = torch.Generator().manual_seed(10)
    half, noise = torch.randn(8, 3, generator=random), torch.randn(60, 3, generator=random)
    log_p = torch.zeros(60, 16)
    solve = (lambda *a: matching.match(*a, solver)) if solver else oracle.exact
    codes, merged = solve(noise, log_p, torch.cat([half, half])), solve(noise, log_p[:, :8], half)
    assert torch.equal(codes % 8, merged)
    assert ((solve(noise, log_p[:, :8], 0 * half) >= 0) & (solve(noise, log_p[:, :8], 0 * half) < 8)).all()


def test_nearly_coinciding_codes_are_told_apart_by_adaptive() -> None:
    random = torch.Generator().manual_seed(12)
    half = torch.randn(300, 16, generator=random)
    codebook = torch.cat([half, half + 0.05 * torch.randn(300, 16, generator=random)])
    noise = torch.randn(250, 16, generator=random)
    log_p = torch.randn(600, generator=random).log_softmax(0).expand(250, -1)
    truth = oracle.exact(noise, log_p, codebook)
    assert (matching.match(noise, log_p, codebook) != truth).double().mean() <= 0.02  # fixed: 0.15


def test_unfinished_tokens_are_read_off(monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden_case("l2_64x8")
    monkeypatch.setattr(solvers, "MAX_STEPS", 3)
    codes, counts = matching.match_counted(case.noise, case.log_p, case.codebook)
    assert counts.max() == 4.5
    assert (case.log_p.gather(1, codes[:, None]) > -math.inf).all()


# ---- refusals


def test_solvers_refuse_bad_settings() -> None:
    for settings, message in (
        ({"name": "euler"}, "must be one of adaptive, fixed, paper"),
        ({"name": "fixed", "evaluations": 7}, "choose one of 5, 6, 8, 10, 14, 20"),
        ({"name": "paper", "evaluations": 0}, "1 or more"),
        ({"tolerance": 0.0}, "between 1e-6 and 0.1"),
        ({"tolerance": math.nan}, "between 1e-6 and 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            Solver(**settings)
    assert Solver("paper", 3).evaluations == 3
    assert all(Solver("fixed", evaluations) for evaluations in GRIDS)


def test_match_refuses_what_it_cannot_solve() -> None:
    noise, log_p, codebook = torch.randn(3, 4), torch.zeros(3, 6), torch.randn(6, 4)
    hole, empty = log_p.clone(), log_p.clone()
    hole[1, 2], empty[1] = math.nan, -math.inf
    for arguments, message in (
        ((noise, log_p, codebook[0]), r"codebook has shape \(4,\)"),
        ((noise, log_p[:, :5], codebook), r"noise has shape \(3, 4\) and log_p \(3, 5\)"),
        ((noise[:2], log_p, codebook), "equal leading dimensions"),
        ((noise.long(), log_p, codebook), "noise is torch.int64"),
        ((noise, hole, codebook), "log_p holds NaN"),
        ((noise, log_p.index_fill(0, torch.tensor([0]), math.inf), codebook), r"log_p holds NaN or \+inf"),
        ((noise, empty, codebook), "-inf for all codes of a token"),
        ((noise * math.nan, log_p, codebook), "noise holds NaN"),
        ((noise, log_p, codebook / 0), "codebook holds NaN"),
    ):
        for function in (matching.match, oracle.exact):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
    for t in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 <= t < 1"):
            matching.velocity(log_p, noise, t, codebook)
