"""What several files are parametrized over."""

import pytest

from gradcomp_jax.testing.contexts import CONTEXTS

every_context = pytest.mark.parametrize("context", CONTEXTS)
