"""Two processes, each a slice of four chips: the numbers of one process, also where one was killed meanwhile."""

import functools
import pathlib
import pickle
import tempfile

import chex
import jax
import pytest

import gradcomp_jax as gc
from tests import problem, slices
from tests.process_slices import CODECS, DIES_AT, STEPS, optimizer, own
from tests.test_processes import launch


@functools.cache
def histories():
    """By codec, what each of the processes has after each step; of those that were killed, of the last steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with pytest.raises(pytest.fail.Exception, match="exit code -9"):
            launch(2, folder, "tests.process_slices", read=lambda file: file)
        launch(2, folder, "tests.process_slices", read=lambda file: file)
        return {id: [pickle.loads((folder / f"{id}-{rank}").read_bytes()) for rank in range(2)] for id in CODECS}


@pytest.mark.parametrize("id", CODECS)
def test_they_train_to_the_numbers_of_one_process(id):
    mesh = slices.mesh_of()
    params, step = gc.place(problem.params(), mesh), gc.train_step(problem.loss_fn, optimizer(id), mesh)
    state, want = gc.init(optimizer(id), params, mesh), []
    for batch in problem.batches(STEPS):
        params, state, loss = step(params, state, batch)
        want.append(jax.tree.map(own, (params, state, loss)))
    want = want[DIES_AT:] if id == "powersgd" else want
    for rank, got in enumerate(histories()[id]):
        mine = jax.tree.map(lambda x, first=4 * rank: x[first : first + 4], want)
        chex.assert_trees_all_close(got, mine, atol=1e-6, rtol=0)
