"""The experiment on recorded gradients: its analysis on cases of known outcome, and one short run from end to end."""

import math
import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import gradcomp_jax as gcj
from experiments import allreduce, bases, gradients

FLAGS = flags.FLAGS
STEPS = 60


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        FLAGS(["test"])
        yield


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_gradients_of_rank_three_are_whole_with_three_columns():
    slices = noise(STEPS, 2, 3) @ noise(3, 144) + noise(144)
    found = bases.fit(slices[:40], slices[40:])
    assert found.samples[1] > 0.01
    for losses in (found.samples[None], found.first, found.own):
        assert (np.abs(losses[:, 2:]) < 1e-4).all()


def test_a_basis_tells_nothing_of_slices_that_lie_elsewhere():
    slices = np.zeros((STEPS, 2, 144), np.float32)
    slices[:, 0, :3], slices[:, 1, 3:6] = noise(2, STEPS, 3)
    found = bases.fit(slices[:40], slices[40:])
    assert found.first[0, -1] < 1e-4
    assert found.first[1, -1] > 0.9
    assert found.own[1, -1] < 1e-4


def test_noise_is_explained_and_lost_all_the_same():
    slices = noise(100 + 200, 2, 768)
    found = bases.fit(slices[:100], slices[100:])
    assert found.samples.shape == (99,)
    assert abs(found.samples[98]) < 1e-4
    expected = (1 - 99 / 768) * (1 + 1 / 100)  # what the columns do not span, of noise and of the samples' mean
    np.testing.assert_allclose(found.first[:, 98], expected, rtol=0.02)
    np.testing.assert_allclose(found.own[:, 98], expected, rtol=0.02)


def test_the_loss_follows_gradients_that_leave_the_basis():
    slices = np.zeros((STEPS, 3, 144), np.float32)
    slices[:30, :, 0], slices[30:, :, 1] = noise(30, 3), noise(30, 3)
    lost = bases.aging(slices[:20], slices[20:], 1)
    assert lost.shape == (40,)
    assert (np.abs(lost[:10]) < 1e-4).all()
    assert (lost[10:] > 0.9).all()


def test_correlation_is_that_of_the_axis_on_which_gradients_agree():
    independent = bases.correlations(noise(100, 3, 3, 16, 16))
    for kind, r in independent.items():
        assert r == pytest.approx(math.sqrt(2 / math.pi / 99), rel=0.1), kind
    alike = bases.correlations(np.broadcast_to(noise(100, 3, 1, 16, 16), (100, 3, 3, 16, 16)))
    assert alike["next column"] == pytest.approx(1)
    assert alike["next filter"] == pytest.approx(independent["next filter"], rel=0.1)


def test_one_kernel_of_each_square_shape_is_the_default():
    shapes = {"a": (3, 3, 3, 16), "b": (3, 3, 16, 16), "c": (3, 3, 16, 16), "d": (3, 3, 32, 32)}
    assert gradients.default_layers(shapes) == ["c", "d"]


def test_a_short_run_gives_a_table_and_a_figure(tmp_path, capsys):
    steps = ["--warmup_steps=2", "--train_steps=6", "--compress_steps=12"]
    FLAGS(["test", "--workers=2", "--batch_size=32", *steps, f"--out_dir={tmp_path}", f"--save={tmp_path}/saved.npz"])
    gradients.main()
    shown = capsys.readouterr().out
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
    for layer in ("blocks/layers/0/conv2", "blocks/layers/1/conv2", "blocks/layers/2/conv2", "noise"):
        assert len(re.findall(rf"^│ {layer} .*", shown, re.MULTILINE)) == 2
    saved = allreduce.recorded_gradients(f"{tmp_path}/saved.npz", gcj.make_mesh(2))
    assert saved["blocks/layers/0/conv2/kernel"].shape == (2, 3, 3, 16, 16)
    assert len(saved) > 20
    assert all(np.any(x[0] != x[1]) for x in saved.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compress_steps=100"], "--compress_steps=100 must be more than --train_steps=100"),
        (["--layers=conv/kernel,conv9"], "--layers: no convolution has the path 'conv9'"),
        (["--layers=linear/kernel"], "--layers: no convolution has the path 'linear/kernel'"),
    ],
)
def test_wrong_settings_end_in_a_message(args, message):
    FLAGS(["test", *args])
    with pytest.raises(SystemExit, match=re.escape(message)):
        gradients.main()
