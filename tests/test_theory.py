"""QSGD against its theorems and contractions against their bounds, and the command from end to end."""

import math
import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import theory

FLAGS = flags.FLAGS
N = 200_000


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        FLAGS(["test"])
        yield


@pytest.fixture(scope="module")
def whole():
    return theory.rounded(N, (1, 2, 4, 16), 16, seed=0)


@pytest.mark.parametrize("s", [1, 2, 4, 16])
def test_nonzeros_keep_to_the_lemma_and_not_to_the_slides(whole, s):
    expected = s * math.sqrt(2 * N / math.pi)  # while s is far below √n
    # Almost a Poisson number, of which this is the mean of 16: four standard deviations, and 1 % for the larger s.
    assert whole[s].nonzeros == pytest.approx(expected, abs=4 * math.sqrt(expected / 16) + 0.01 * expected)
    assert whole[s].nonzeros < theory.nonzeros_bound(N, s)
    assert (whole[s].nonzeros < theory.slides_nonzeros_bound(N, s)) == (s == 1)


def test_the_sparse_code_keeps_to_theorem_3_2(whole):
    for s in (2, 4, 16):
        assert 0.5 < whole[s].bits["sparse"] / theory.sparse_bound(N, s) < 1


@pytest.mark.parametrize("d", [128, 512])
def test_the_variance_is_that_of_rounding_and_keeps_to_lemma_3_1(d):
    found = theory.rounded(d, (1, 7, 127), 2000, seed=1)
    v = np.random.default_rng(0).standard_normal((2000, d))
    for s, measured in found.items():
        up = np.abs(v) / np.linalg.norm(v, axis=1, keepdims=True) * s % 1
        assert measured.variance == pytest.approx((up * (1 - up)).sum(1).mean() / s**2, rel=0.03)
        assert measured.variance < theory.variance_bound(d, s)


def test_bounds_where_they_are_known():
    assert theory.variance_bound(512, 16) == pytest.approx(math.sqrt(512) / 16)
    assert theory.variance_bound(512, 64) == pytest.approx(512 / 64**2)
    root = math.sqrt(N)
    assert theory.dense_bound(N, root) - 0.5 == pytest.approx(2 + math.log2(3) / 2)  # what Corollary 3.3 calls 2.8
    assert theory.sparse_bound(N, root) == pytest.approx(2 * (3 + 1.5))  # bits of 2 n nonzeros, log2(4 n / 2 n) = 1


def test_contractions_of_matrices_that_are_known():
    same = np.eye(8)  # all singular values alike: the bound is met
    assert theory.rank_loss(same, 3) == pytest.approx(1 - 3 / 8)
    assert theory.top_loss(same, 3) == pytest.approx(1 - 3 / 8)
    assert theory.top_loss(np.ones((8, 8)), 16) == pytest.approx(1 - 16 / 64)
    assert theory.rank_loss(np.ones((8, 8)), 1) == pytest.approx(0, abs=1e-12)
    assert theory.same_bits(4, (256, 128)) * 64 == 4 * (256 + 128) * 32


def test_the_three_matrices_differ_as_they_should():
    compared = theory.matrices(seed=0)
    squares = 1 / np.arange(1, theory.SIDE + 1) ** 2
    assert theory.rank_loss(compared["singular values 1 / i"], 4) == pytest.approx(squares[4:].sum() / squares.sum())
    noise, power, gradient = (theory.rank_loss(x, 4) for x in compared.values())
    assert noise > 0.9 > 0.2 > power > gradient
    assert all(x.shape == (theory.SIDE, theory.SIDE) for x in compared.values())


def test_a_short_run_gives_a_table_and_a_figure(tmp_path, capsys):
    FLAGS(["test", "--dimension=9000", "--draws=1", f"--out_dir={tmp_path}"])
    theory.main()
    shown = capsys.readouterr().out
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
    for words in (r"slides: s² \+ √n +│ n = 9000, s = 4", r"dense, all signs +│ Corollary 3.3 "):
        assert re.search(rf"{words}.* does NOT hold │$", shown, re.MULTILINE)
    for words in (r"Lemma 3.1: s \(s \+ √n\) +│ n = 9000, s = 4", r"sparse +│ Theorem 3.2", r"\|v\|² +│ Lemma 3.1 "):
        assert re.search(rf"{words}.* holds │$", shown, re.MULTILINE)


@pytest.mark.parametrize("n", [8192, 9001, 2**20])
def test_wrong_settings_end_in_a_message(n):
    FLAGS(["test", f"--dimension={n}"])
    with pytest.raises(SystemExit, match=f"--dimension={n} must be a multiple of 4, above 8192 and at most 1048575"):
        theory.main()
