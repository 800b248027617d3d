"""A Flax transformer on text, its own training step compressed by two lines: `powersgd` in the chain, `data_parallel`.

    python examples/transformer.py --dir=/tmp/transformer    # given again, it goes on where it was

It has what such scripts have: AdamW with a warm-up and a mask, clipping, accumulation, bfloat16, dropout, checkpoints.
The text is the source code of Python's own library.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import gradcomp_jax as gcj

jax.config.update("jax_num_cpu_devices", 4)  # the CPU stands for four devices; leave it out where there are some
LENGTH, WIDTH = 64, 128
TEXT = np.frombuffer(
    b"".join(path.read_bytes() for path in sorted(pathlib.Path(argparse.__file__).parent.glob("*.py"))), np.uint8
)


class Transformer(nn.Module):
    """Two blocks over bytes."""

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(256, WIDTH)(tokens) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            h = nn.LayerNorm()(x).astype(jnp.bfloat16)
            x += nn.MultiHeadDotProductAttention(num_heads=4, dtype=jnp.bfloat16)(h, mask=mask)
            h = nn.Dense(4 * WIDTH, dtype=jnp.bfloat16)(nn.LayerNorm()(x))
            x += nn.Dropout(0.1, deterministic=not train)(nn.Dense(WIDTH, dtype=jnp.bfloat16)(nn.gelu(h)))
        return nn.Dense(256)(nn.LayerNorm()(x))


@gcj.data_parallel(rng="key", donate="state")
def train_step(state, batch, key):
    """Mean gradients of two halves of the batch, one after another, and one update."""

    def loss_fn(params, tokens, key):
        logits = state.apply_fn({"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def micro_step(total, given):
        loss_and_grads = jax.value_and_grad(loss_fn)(state.params, *given)
        return jax.tree.map(lambda t, x: t + x / 2, total, loss_and_grads), None

    halves = batch.reshape(2, -1, LENGTH + 1), jax.random.split(key)
    (loss, grads), _ = jax.lax.scan(micro_step, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)), halves)
    return state.apply_gradients(grads=grads), loss


def batches(first, steps, rows=64):
    """The rows of each step are drawn from its number, so a run that goes on sees the same."""
    for step in range(first, steps):
        begins = np.random.default_rng(step).integers(len(TEXT) - LENGTH - 1, size=(rows, 1))
        yield step, TEXT[begins + np.arange(LENGTH + 1)].astype(np.int32)


def main():
    """Trains, and saves every 50 steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    model = Transformer()
    params = model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32), train=False)["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, args.steps // 10, args.steps)
    decayed = jax.tree.map(lambda x: x.ndim > 1, params)
    tx = optax.chain(gcj.powersgd(rank=4), optax.clip_by_global_norm(1.0), optax.adamw(schedule, mask=decayed))
    state, first = TrainState.create(apply_fn=model.apply, params=params, tx=tx), 0
    options = ocp.CheckpointManagerOptions(save_interval_steps=50)
    with ocp.CheckpointManager(pathlib.Path(args.dir).absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state, first = gcj.restore(args.dir, state), manager.latest_step() + 1  # of any number of workers
        for step, batch in batches(first, args.steps):
            state, loss = train_step(state, batch, jax.random.fold_in(jax.random.key(1), step))
            manager.save(step, args=ocp.args.StandardSave(state))
            if step % 20 == 0:
                sent = gcj.wire_bits(state.opt_state).last / 8e3
                print(f"step {step}: loss {loss:.3f}, {sent:.0f} kB sent by each worker")


if __name__ == "__main__":
    main()
