"""The laws for a codec that lives elsewhere: `check`, and its parts.

>>> import gradcomp_jax as gcj
>>> report = gcj.testing.check(lambda: gcj.none(), tree={"w": (8, 4)}, steps=4)
>>> report.codec
'none'

`laws.py` states the laws. `contexts.py` runs a codec under vmap, pmap and shard_map. `exchanges.py` runs its exchange
alone, over the wire of `recorder.py`. `trees.py` makes gradients.
"""

from gradcomp_jax.testing.checking import Report, check
from gradcomp_jax.testing.laws import LAWS, LawError

__all__ = ["LAWS", "LawError", "Report", "check"]
