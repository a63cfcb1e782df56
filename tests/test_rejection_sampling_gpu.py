"""The GPU kernels in interpret mode against the sorting reference, and lowered for cuda through Triton."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rejection_sampling import NO_DRAFT, Truncation, Verdict, rejection_sample
from pallas_kernels.rejection_sampling.reference import truncated_probs

B, G, V = 8, 4, 8193
"""The shape of the special cases, which share one as compiling takes longer than running, even unoptimised. The last
token is alone in its chunk, and in its load."""

TOP = float(np.nextafter(np.float32(1), np.float32(0)))

decide = jax.jit(
    rejection_sample,
    static_argnames=("rule", "implementation", "interpret"),
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)
probs_of = jax.jit(truncated_probs)


def rows_of(*rows):
    """Truncation from (temperature, top_k, top_p, min_p) of each row."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Truncation(jnp.array(temperature), jnp.array(top_k, jnp.int32), jnp.array(top_p), jnp.array(min_p))


MIXED = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.1),
    (0.7, 50, 0.9, 0.0),
    (1.3, 0, 0.95, 0.0),
    (0.9, 0, 1.0, 0.05),
    (1.0, 1, 1.0, 0.0),
    (0.8, 20, 1.0, 0.0),
    (0.6, 100, 0.8, 0.02),
]


def batch(seed, sampled, shape=(B, G, V), dtype=jnp.float32, rows=MIXED):
    """Arguments of rejection_sample: drafts drawn from a law near the target's, or its best tokens."""
    B, G, V = shape
    rng = np.random.RandomState(seed)
    logits = jnp.asarray(4 * rng.randn(B, G + 1, V), dtype)
    near = np.asarray(logits, np.float32)[:, :G] / np.array([max(row[0], 0.3) for row in rows[:B]])[:, None, None]
    near = near + 0.3 * rng.randn(*near.shape)
    drafts = np.argmax(near + rng.gumbel(size=near.shape) if sampled else near, axis=-1)
    return {
        "logits": logits,
        "drafts": jnp.asarray(drafts, jnp.int32),
        "draft_probs": jax.nn.softmax(jnp.asarray(near, jnp.float32), axis=-1) if sampled else None,
        "accept_uniforms": jnp.asarray(rng.rand(B, G), jnp.float32),
        "recover_uniforms": jnp.asarray(rng.rand(B, G + 1, 3), jnp.float32),
        "rows": rows_of(*rows[:B]),
    }


def both(inputs, rule="residual"):
    """The kernels' verdict, which has to be the reference's."""
    got = decide(**inputs, rule=rule, implementation="gpu", interpret=True)
    want = decide(**inputs, rule=rule, implementation="reference")
    assert got.num_accepted.dtype == got.next_token.dtype == jnp.int32
    np.testing.assert_array_equal(got.num_accepted, want.num_accepted)
    np.testing.assert_array_equal(got.next_token, want.next_token)
    return Verdict(*map(np.asarray, got))


@pytest.mark.parametrize(
    ("shape", "sampled"),
    [
        ((1, 0, 100), False),
        ((8, 8, 100), True),
        ((B, G, V), False),
        ((B, G, V), True),
        ((4, 3, 49152), True),
        ((4, 1, 128256), True),
        ((2, 2, 151936), False),
    ],
)
def test_mixed_rows_of_any_size_decide_as_in_the_reference(shape, sampled):
    for seed in range(2):
        both(batch(seed, sampled, shape))


@pytest.mark.parametrize(
    ("rule", "sampled", "shape"),
    [("matching", False, (B, G, V)), ("block", True, (B, G, V)), ("block", False, (8, 7, 100))],
)
def test_the_other_rules_decide_as_in_the_reference(rule, sampled, shape):
    accepted = [both(batch(seed, sampled, shape), rule).num_accepted for seed in range(3)]
    assert len(np.unique(accepted)) > 2


@pytest.mark.parametrize(("dtype", "shape"), [(jnp.bfloat16, (6, 5, V)), (jnp.float16, (8, 6, 100))])
def test_short_floats_decide_as_in_the_reference(dtype, shape):
    """They also tie more often than they differ; tokens at a threshold are all kept."""
    for seed in range(3):
        both(batch(seed, True, shape, dtype))


@pytest.mark.parametrize("sampled", [False, True])
def test_sure_drafts_are_all_accepted_and_followed_by_a_bonus(sampled):
    inputs = batch(0, sampled)
    inputs["accept_uniforms"] = jnp.zeros((B, G))
    probs = probs_of(inputs["logits"], inputs["rows"])
    inputs["drafts"] = jnp.argmax(probs, axis=-1)[:, :G].astype(jnp.int32)
    verdict = both(inputs)
    assert (verdict.num_accepted == G).all()
    assert (np.asarray(probs)[np.arange(B), G, verdict.next_token] > 0).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_impossible_drafts_are_rejected_at_the_first_position(sampled):
    inputs = batch(1, sampled)
    inputs["accept_uniforms"] = jnp.zeros((B, G))
    inputs["logits"] = inputs["logits"].at[jnp.arange(B), 0, inputs["drafts"][:, 0]].set(-jnp.inf)
    verdict = both(inputs)
    assert (verdict.num_accepted == 0).all()
    assert (verdict.next_token != np.asarray(inputs["drafts"])[:, 0]).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_all_mass_on_the_last_token_is_found_behind_the_last_full_tile(sampled):
    inputs = batch(2, sampled)
    inputs["logits"] = jnp.full((B, G + 1, V), -jnp.inf, jnp.float32).at[:, :, V - 1].set(-3.0)
    inputs["drafts"] = jnp.full((B, G), 7, jnp.int32)
    assert (both(inputs).next_token == V - 1).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_masked_by_minus_infinity_are_never_given(sampled):
    for seed in range(3):
        inputs = batch(seed, sampled)
        masked = np.random.RandomState(seed).rand(B, G + 1, V) < 0.99
        inputs["logits"] = jnp.where(masked, -jnp.inf, inputs["logits"])
        verdict = both(inputs)
        assert not masked[np.arange(B), verdict.num_accepted, verdict.next_token].any()


def test_drafts_from_the_target_itself_are_always_accepted():
    inputs = batch(3, True)
    inputs["draft_probs"] = probs_of(inputs["logits"], inputs["rows"])[:, :G]
    inputs["drafts"] = jnp.argmax(inputs["draft_probs"], axis=-1).astype(jnp.int32)
    # The two differ by float32 rounding, so a uniform within 1e-5 of one may reject.
    inputs["accept_uniforms"] = jnp.full((B, G), 1 - 1e-5, jnp.float32)
    assert (both(inputs).num_accepted == G).all()


def test_a_rejection_without_residual_falls_back_to_the_target():
    inputs = batch(4, True)
    probs = probs_of(inputs["logits"], inputs["rows"])[:, :G]
    inputs["draft_probs"] = probs * (1 + 1e-4)
    inputs["drafts"] = jnp.argmax(probs, axis=-1).astype(jnp.int32)
    inputs["accept_uniforms"] = jnp.full((B, G), TOP, jnp.float32)
    verdict = both(inputs)
    assert (verdict.num_accepted == 0).all()
    assert (np.asarray(probs)[np.arange(B), 0, verdict.next_token] > 0).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_places_without_a_draft_end_a_row(sampled):
    inputs = batch(5, sampled)
    lengths = np.arange(B) % (G + 1)
    missing = np.arange(G) >= lengths[:, None]
    inputs["drafts"] = jnp.where(missing, NO_DRAFT, inputs["drafts"])
    inputs["accept_uniforms"] = jnp.zeros((B, G))
    if sampled:
        inputs["draft_probs"] = jnp.where(missing[..., None], jnp.nan, inputs["draft_probs"])
    verdict = both(inputs)
    assert (verdict.num_accepted <= lengths).all() and (verdict.num_accepted == lengths).any()


def test_a_drafter_that_gives_no_probabilities_is_not_believed():
    for broken in (0.0, jnp.nan):
        inputs = batch(6, True)
        inputs["draft_probs"] = jnp.full((B, G, V), broken, jnp.float32)
        assert (both(inputs).num_accepted == 0).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_nan_end_and_leave_the_others_alone(sampled):
    inputs = batch(7, sampled)
    expected = both(inputs)
    inputs["logits"] = inputs["logits"].at[1].set(jnp.nan).at[4, :, 100:].set(jnp.nan).at[6, 0, 5].set(jnp.inf)
    got = decide(**inputs, rule="residual", implementation="gpu", interpret=True)
    others = [0, 2, 3, 5, 7]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], other[others])
    assert ((got.next_token >= 0) & (got.next_token < V)).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_greedy_rows_take_the_first_of_the_best_tokens(sampled):
    inputs = batch(8, sampled, rows=[(0.0, 3, 0.5, 0.5)] * B)
    inputs["logits"] = jnp.round(inputs["logits"] / 3)
    best = np.argmax(inputs["logits"], axis=-1)
    inputs["drafts"] = jnp.asarray(best[:, :G], jnp.int32).at[:, 2].add(jnp.arange(B) % 2)
    inputs["accept_uniforms"] = jnp.zeros((B, G))
    verdict = both(inputs)
    num_accepted = np.where(np.arange(B) % 2, 2, G)
    np.testing.assert_array_equal(verdict.next_token, best[np.arange(B), verdict.num_accepted])
    assert sampled or (verdict.num_accepted == num_accepted).all()


@pytest.mark.parametrize(
    ("rows", "dtype", "sampled", "rule"),
    [(rows, dtype, sampled, "residual") for rows in (1, 8) for dtype in ("float32", "bfloat16") for sampled in (0, 1)]
    + [(8, "float32", True, "matching"), (8, "float32", True, "block")],
)
def test_the_kernels_lower_for_cuda_through_triton(rows, dtype, sampled, rule):
    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    arguments = (
        struct(5, 128256, dtype=dtype),
        struct(4, dtype=jnp.int32),
        struct(4, 128256) if sampled else None,
        struct(4),
        struct(5, 3),
        Truncation(struct(), struct(dtype=jnp.int32), struct(), struct()),
    )
    target = "__gpu$xla.gpu.triton"
    exported = jax.export.export(
        jax.jit(functools.partial(rejection_sample, rule=rule, implementation="gpu")),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
    )(*arguments)
    module = exported.mlir_module()
    assert module.count(f"custom_call @{target}") == 2
    assert "rejection_sampling_law" in module and "rejection_sampling_draw" in module
    # Nothing of the vocabulary's size is written: no result of a kernel or of what lies between is that large.
    results = [line.split("->")[-1] for line in module.splitlines() if " = " in line]
    assert not any("x128256x" in result for result in results)
