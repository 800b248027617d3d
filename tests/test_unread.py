"""Loops that read no result end as they should, on more emulated devices than there are cores."""

import pytest

from experiments import unread


@pytest.mark.parametrize("name", unread.CODECS)
def test_many_steps_whose_results_are_not_read(name):
    well, words = unread.outcome(name, steps=200, devices=8, timeout=300)
    assert well, words
