"""What is measured of images: Fréchet distance, its error and its limit, KID, Inception Score, precision and
recall, variance within classes.

Means and covariances are float64 and streaming (Chan et al. 1979): parts made anywhere merge into what one
pass over all images would have found. Everything here is numbers in, numbers out.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D]
BUFFER = 1024  # rows collected before they enter a covariance: many smaller updates cost more
COMPONENTS = 50  # principal components of the pixel distance
GROUPS, FEWEST = 10, 5  # of rounds of classes, left out in turn for the error of a distance
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1_000, 2020  # of KID: torch-fidelity's


# ---- streaming statistics


class Moments:
    """Mean [D] and sum of squared deviations [D, D] of rows, in one pass, mergeable."""

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.m2 = np.zeros((dim, dim))
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Rows [B, D] of any float type."""
        self._rows.append(np.asarray(rows, dtype=np.float64))
        if sum(map(len, self._rows)) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Take the collected rows in."""
        if not self._rows:
            return
        rows = np.concatenate(self._rows)
        self._rows = []
        mean = rows.mean(0)
        centred = rows - mean
        self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add what ``other`` has seen."""
        self.flush()
        other.flush()
        self._join(other.n, other.mean, other.m2)

    def _join(self, n: int, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.n + n
        if n == 0:
            return
        step = mean - self.mean
        self.m2 = self.m2 + m2 + np.outer(step, step) * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total

    def without(self, part: Moments) -> Moments:
        """The moments of the rows that are not in ``part``, which this has seen: the inverse of ``merge``."""
        self.flush()
        part.flush()
        rest = Moments(len(self.mean))
        rest.n = self.n - part.n
        rest.mean = self.mean + (self.mean - part.mean) * (part.n / rest.n)
        step = part.mean - rest.mean
        rest.m2 = self.m2 - part.m2 - np.outer(step, step) * (rest.n * part.n / self.n)
        return rest

    def gaussian(self) -> Gaussian:
        """Mean [D] and unbiased covariance [D, D]."""
        self.flush()
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 samples or more, and {self.n} were seen.")
        return self.mean, self.m2 / (self.n - 1)


class ClassVariance:
    """Variance of pixels within a class, averaged over the pixels: one mean image [P] and one sum of
    squares a class.
    """

    def __init__(self, classes: int, pixels: int) -> None:
        self.n = np.zeros(classes)
        self.mean = np.zeros((classes, pixels))
        self.m2 = np.zeros(classes)

    def add(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Pixels [B, P] and their labels [B]."""
        for k in np.unique(labels):
            rows = pixels[labels == k].astype(np.float64)
            mean = rows.mean(0)
            self._join(np.array([k]), np.array([len(rows)]), mean[None], np.array([np.square(rows - mean).sum()]))

    def merge(self, other: ClassVariance) -> None:
        """Add what ``other`` has seen."""
        seen = np.flatnonzero(other.n)
        self._join(seen, other.n[seen], other.mean[seen], other.m2[seen])

    def _join(self, k: np.ndarray, n: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.n[k] + n
        step = mean - self.mean[k]
        self.m2[k] += m2 + np.square(step).sum(1) * self.n[k] * n / total
        self.mean[k] += step * (n / total)[:, None]
        self.n[k] = total

    def value(self) -> float | None:
        """The mean over classes with 2 images or more; None where there is none."""
        enough = self.n >= 2
        if not enough.any():
            return None
        return float((self.m2[enough] / (self.n[enough] - 1)).mean() / self.mean.shape[1])


class InceptionScore:
    """exp of the mutual information of image and predicted class, the mean over blocks of images."""

    def __init__(self, blocks: int, classes: int) -> None:
        self.n = np.zeros(blocks)
        self.p = np.zeros((blocks, classes))
        self.p_log_p = np.zeros(blocks)

    def add(self, logits: np.ndarray, block: np.ndarray) -> None:
        """Logits [B, K] and the block [B] that each image belongs to."""
        p = softmax(logits.astype(np.float64), axis=1)
        p_log_p = (p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(1)
        for i in np.unique(block):
            self.n[i] += (block == i).sum()
            self.p[i] += p[block == i].sum(0)
            self.p_log_p[i] += p_log_p[block == i].sum()

    def merge(self, other: InceptionScore) -> None:
        """Add what ``other`` has seen."""
        self.n += other.n
        self.p += other.p
        self.p_log_p += other.p_log_p

    def value(self) -> float:
        """The mean of the blocks' scores, each weighing as its images.

        ADM's evaluator counts a short last block like the others; fewer images score lower, so it would pull the mean.
        """
        return float(np.average(self.scores(), weights=self.n[self.n > 0]))

    def error(self) -> float | None:
        """Standard error of ``value``, from the spread of the whole blocks; None of fewer than five."""
        scores = self.scores()[self.n[self.n > 0] == self.n.max()]
        return float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) >= FEWEST else None

    def scores(self) -> np.ndarray:
        """The score of each block."""
        seen = self.n > 0
        q = self.p[seen] / self.n[seen][:, None]
        entropy = (q * np.log(np.maximum(q, np.finfo(np.float64).tiny))).sum(1)
        return np.exp(self.p_log_p[seen] / self.n[seen] - entropy)


# ---- distances


def frechet(a: Gaussian, b: Gaussian, root: np.ndarray | None = None) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two (mean [D], covariance [D, D]).

    The root's trace is the sum of the square roots of the eigenvalues of F' S_b F, where S_a = F F':
    symmetric matrices throughout, hence real, and right for singular covariances. ``root`` is F, for who has it.
    A result like -1e-7 is rounding.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = factor(cov_a) if root is None else root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ cov_b @ root), 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def factor(cov: np.ndarray) -> np.ndarray:
    """F with F F' = ``cov``, which may be singular."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0))


@dataclass(frozen=True)
class Jackknife:
    """What a distance is without each group of its rows: its error and its limit, and what a difference's come from.

    ``pseudo`` [G] are the pseudo-values of the groups, ``times`` [G] how many times all rows are those of a group;
    ``limit`` is the distance of infinitely many rows.
    """

    pseudo: np.ndarray
    times: np.ndarray
    limit: float

    @property
    def error(self) -> float:
        """The standard error of the distance."""
        return float(np.sqrt((np.square(self.pseudo - self.limit) / (self.times - 1)).mean()))

    def minus(self, other: Jackknife) -> Jackknife | None:
        """That of the difference of two distances whose rows are pairs, drawn from the same noise.

        Leaving a group out of both at once changes both alike as far as the pairs vary together, so the error is that
        of the difference itself, not that of independent rows. None where the groups are not the same.
        """
        if not np.array_equal(self.times, other.times):
            return None
        return Jackknife(self.pseudo - other.pseudo, self.times, self.limit - other.limit)


def jackknife(features: np.ndarray, total: Moments, reference: Gaussian, rounds: np.ndarray) -> Jackknife | None:
    """Standard error of the Fréchet distance of features [N, D] to ``reference``, and its limit for N to infinity.

    The jackknife (Quenouille, Tukey; of unequal groups Busing et al. 1999) leaves up to ten groups out in turn: the
    spread of the distances gives the error, and, as the bias of the distance goes with 1/N, what is left of the
    distance without it the limit (FID-infinity, Chong & Forsyth 2020). Unlike a line through the distances of the first
    N/2 .. N rows, it weighs all rows alike, which halves the variance. Groups are whole rounds of classes, of which
    ``rounds`` [N] has each row's: groups in which classes are missing would differ by more than chance.

    ``total`` are the moments of all rows, so that one group is in memory at a time. The reference is taken as it is:
    its own finite size shifts both. None below 2 D rows, where covariances are close to singular and the bias is no
    line, and below five rounds.
    """
    _, number, sizes = np.unique(rounds, return_inverse=True, return_counts=True)
    n, groups = len(features), min(GROUPS, int((sizes == sizes.max()).sum()))  # a last round may not be whole
    if n < 2 * features.shape[1] or groups < FEWEST:
        return None
    root = factor(reference[1])

    def without(group: int) -> tuple[int, float]:
        part = Moments(features.shape[1])
        part.add(features[number % groups == group])
        part.flush()
        return part.n, frechet(reference, total.without(part).gaussian(), root)

    total.flush()
    with ThreadPoolExecutor() as pool:  # LAPACK runs without Python's lock
        left_out, distances = map(np.array, zip(*pool.map(without, range(groups)), strict=True))
    whole, times = frechet(reference, total.gaussian(), root), n / left_out
    limit = groups * whole - ((1 - 1 / times) * distances).sum()
    return Jackknife(times * whole - (times - 1) * distances, times, float(limit))


def kid(
    generated: np.ndarray,
    real: np.ndarray,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = SUBSET_SEED,
) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018) of features [N, D] and [M, D]: mean and deviation over subsets.

    Subsets are drawn as torch-fidelity draws them, smaller ones where a set is smaller than ``size``.
    """
    size, rng = min(size, len(generated), len(real)), np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = generated[rng.choice(len(generated), size, replace=False)]
        y = real[rng.choice(len(real), size, replace=False)]
        distances.append(mmd2(x.astype(np.float64), y.astype(np.float64)))
    return float(np.mean(distances)), float(np.std(distances))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of rows [N, D] and [M, D] for the kernel (x.y / D + 1)^3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def pixel_frechet(a: Moments, reference: Moments) -> float:
    """Fréchet distance of the pixels on the reference's 50 leading principal components.

    It sees what a classifier's features forgive: blur, thickness, position.
    """
    mean, cov = reference.gaussian()
    basis = np.linalg.eigh(cov)[1][:, -COMPONENTS:]
    own_mean, own_cov = a.gaussian()
    return frechet((own_mean @ basis, basis.T @ own_cov @ basis), (mean @ basis, basis.T @ cov @ basis))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3, block: int = 1_000) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features [N, D] and [M, D], float32.

    A point's ball reaches to its k-th nearest neighbour in its own set; precision is the share of generated
    points in some real ball, recall the share of real points in some generated ball. Both depend on N and M.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(
            f"precision and recall need more than {k} images a set; they have {len(generated)} and {len(real)}."
        )
    centre = real.mean(0)  # squared distances from products lose digits far from the origin
    fake, true = (torch.from_numpy(rows - centre).float() for rows in (generated, real))
    fake_radius, true_radius = _radii(fake, k, block), _radii(true, k, block)
    inside_real = torch.zeros(len(fake), dtype=torch.bool)
    inside_fake = torch.zeros(len(true), dtype=torch.bool)
    for rows in range(0, len(fake), block):
        for columns in range(0, len(true), block):
            r, c = slice(rows, rows + block), slice(columns, columns + block)
            distance = _squared(fake[r], true[c])
            inside_real[r] |= (distance <= true_radius[c]).any(1)
            inside_fake[c] |= (distance <= fake_radius[r, None]).any(0)
    return float(inside_real.double().mean()), float(inside_fake.double().mean())


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """Squared distance [N] to the k-th nearest neighbour; the smallest distance of all is the point to
    itself. A pair of blocks is looked at once, for the rows of both.
    """
    best = torch.full((len(x), k + 1), torch.inf)
    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for j in range(i, len(x), block):
            columns = slice(j, j + block)
            distance = _squared(x[rows], x[columns])
            best[rows] = torch.cat([best[rows], distance], 1).topk(k + 1, largest=False).values
            if j > i:
                best[columns] = torch.cat([best[columns], distance.T], 1).topk(k + 1, largest=False).values
    return best.amax(1)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b.square().sum(1)[None] + a.square().sum(1)[:, None], a, b.T, alpha=-2).clamp_(min=0)
