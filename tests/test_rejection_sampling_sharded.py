"""The vocabulary-sharded form under shard_map, on four CPU devices of a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from models import QUICK

PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import re
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.rejection_sampling import Truncation, rejection_sample
from pallas_kernels.rejection_sampling.xla import local_argmax

B, G, V = 16, 3, 4 * 4096
rng = np.random.RandomState(0)
logits = jnp.asarray(rng.randn(B, G + 1, V).astype(np.float32) * 3)
logits = logits.at[0].set(jnp.where(jnp.arange(V) < 3 * 4096, -jnp.inf, logits[0]))  # all mass on the last device
probs = jax.nn.softmax(logits[:, :G] + jnp.asarray(rng.randn(B, G, V).astype(np.float32) * 0.3))
drafts = jnp.argmax(jnp.log(probs) + jnp.asarray(rng.gumbel(size=probs.shape)), axis=-1).astype(jnp.int32)
drafts = drafts.at[1, 1:].set(-1).at[2].set(-1)
rows = Truncation(
    jnp.asarray(rng.choice([0.0, 0.7, 1.0], B), jnp.float32),
    jnp.asarray(rng.choice([0, 5, 200], B), jnp.int32),
    jnp.asarray(rng.choice([1.0, 0.9], B), jnp.float32),
    jnp.asarray(rng.choice([0.0, 0.05], B), jnp.float32),
)
coins = jnp.asarray(rng.rand(B, G), jnp.float32)
recover = jnp.asarray(rng.rand(B, G + 1, 3), jnp.float32)
mesh = jax.make_mesh((4,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
split = P(None, None, "vocab")

for rule in ("residual", "matching", "block"):
    for drawn in (probs, None):
        def whole(logits, drafts, probs, coins, recover, rows):
            return rejection_sample(logits, drafts, probs, coins, recover, rows, rule=rule, implementation="xla")

        def parts(logits, drafts, probs, coins, recover, rows):
            return rejection_sample(logits, drafts, probs, coins, recover, rows, rule=rule, axis="vocab")

        specs = (split, P(), split if drawn is not None else P(), P(), P(), P())
        sharded = jax.jit(jax.shard_map(parts, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
        arguments = logits, drafts, drawn, coins, recover, rows
        placed = [
            jax.tree.map(lambda x, spec=spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), argument)
            for argument, spec in zip(arguments, specs, strict=True)
        ]
        program = sharded.lower(*placed).compile()
        for a, b in zip(jax.jit(whole)(*arguments), program(*placed), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        text = program.as_text()
        assert "all-reduce" in text
        for line in text.splitlines():
            if re.search(r"= \\S+ (all-gather|all-reduce|all-to-all|collective-permute)\\(", line):
                shape = re.search(r"\\[([\\d,]*)\\]", line)[1]
                size = int(np.prod([int(n) for n in shape.split(",") if n]))
                # What crosses devices: a few numbers a row, the largest the sums of the 2048-token chunks.
                assert size <= B * (G + 1) * V // 2048, line

argmax = jax.shard_map(lambda x: local_argmax(x, "vocab"), mesh=mesh, in_specs=split, out_specs=P(), check_vma=False)
best = jax.jit(argmax)
np.testing.assert_array_equal(best(logits), jnp.argmax(logits, axis=-1))
tied = jnp.zeros_like(logits).at[:, :, [5000, 9000]].set(1.0)
assert (best(tied) == 5000).all()
text = best.lower(jax.device_put(logits, jax.NamedSharding(mesh, split))).compile().as_text()
assert "all-gather" not in text and len(re.findall(r" all-reduce\\(", text)) == 2
print("sharded forms agree")
"""


@pytest.mark.slow
def test_sharded_over_the_vocabulary_all_rules_decide_as_on_one_device_and_gather_no_logits():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=os.environ | QUICK | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded forms agree" in done.stdout
