"""Kernels of the acceptance rules: against the reference, with exact laws of what they return, compiled for TPUs."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from laws import RowParams, truncated

from pallas_kernels.rejection_sampling import NO_DRAFT, RULES, Truncation, rejection_sample
from pallas_kernels.rejection_sampling.benchmark import estimate

pytestmark = pytest.mark.usefixtures("usual_compiler")
TOP = float(np.nextafter(np.float32(1), np.float32(0)))
EDGE = 1e-5
"""How close to the ends of an interval of uniforms a kernel is evaluated; also the error of an integrated law."""

MIXED = [
    RowParams(),
    RowParams(0.0),
    RowParams(0.7, top_k=3),
    RowParams(1.4, top_p=0.75),
    RowParams(0.9, min_p=0.2),
    RowParams(1.1, top_k=40, top_p=0.9, min_p=0.05),
]

KERNELS = ["tpu", "gpu", "xla"]


def truncation(rows):
    """The parameters of a batch, from a list of RowParams."""
    fields = zip(*((row.temperature, row.top_k, row.top_p, row.min_p) for row in rows), strict=True)
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    return Truncation(*(np.asarray(field, dtype) for field, dtype in zip(fields, dtypes, strict=True)))


@functools.cache
def compiled(implementation, rule, interpret, tree, shapes):
    """The operation for arguments of these shapes; with little optimisation, since compiling is what takes long."""

    def run(*args):
        options = {"interpret": interpret} if implementation in ("tpu", "gpu") else {}
        return rejection_sample(*args, rule=rule, implementation=implementation, **options)

    args = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(run).lower(*args).compile(compiler_options=options)


def decide(implementation, rule, args, interpret=True):
    """(num_accepted, next_token) as lists."""
    args = jax.tree.map(jnp.asarray, args)
    leaves, tree = jax.tree.flatten(args)
    run = compiled(implementation, rule, interpret, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    return tuple(x.tolist() for x in run(*args))


def example(seed, B, G, V, sampled=True, dtype=jnp.float32, params=MIXED):
    """Arguments of a batch whose drafts are near the target's law; every other row has placeholders at its end."""
    rng = np.random.RandomState(seed)
    logits = (rng.randn(B, G + 1, V) * 3).astype(dtype)
    near = logits[:, :G].astype(np.float32) + rng.randn(B, G, V).astype(np.float32) * 0.3
    probs = softmax(near)
    drafts = np.where(rng.rand(B, G) < 0.3, probs.argmax(axis=-1), (near + rng.gumbel(size=near.shape)).argmax(axis=-1))
    num_drafts = np.where(np.arange(B) % 2, rng.randint(0, G + 1, B), G)
    drafts = np.where(np.arange(G) < num_drafts[:, None], drafts, NO_DRAFT)
    uniforms = rng.rand(B, G).astype(np.float32), rng.rand(B, G + 1, 3).astype(np.float32)
    rows = truncation([params[row % len(params)] for row in range(B)])
    return logits, drafts.astype(np.int32), probs if sampled else None, *uniforms, rows


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def changed(args, **fields):
    """The same arguments but for some of them."""
    names = ("logits", "drafts", "draft_probs", "accept_uniforms", "recover_uniforms", "rows")
    return tuple(fields.get(name, arg) for name, arg in zip(names, args, strict=True))


def filled(array, *indices, value):
    """A copy of an array with a value at some indices."""
    array = array.copy()
    for index in indices:
        array[index] = value
    return array


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("rule", "B", "G", "V", "sampled", "dtype"),
    [
        ("residual", 1, 1, 100, True, jnp.float32),
        ("residual", 3, 2, 8193, False, jnp.bfloat16),
        ("residual", 9, 3, 8193, True, jnp.float32),
        ("residual", 1, 8, 49152, True, jnp.bfloat16),
        ("residual", 2, 1, 128256, True, jnp.float32),
        ("residual", 1, 2, 151936, False, jnp.bfloat16),
        ("residual", 2, 0, 100, False, jnp.float32),
        ("residual", 8, 6, 100, True, jnp.float16),
        ("matching", 8, 4, 100, False, jnp.float32),
        ("matching", 1, 3, 128256, False, jnp.bfloat16),
        ("block", 9, 3, 8193, True, jnp.float32),
        ("block", 1, 9, 100, True, jnp.float32),
        ("block", 3, 2, 49152, False, jnp.bfloat16),
    ],
)
def test_a_kernel_decides_as_the_reference_does(implementation, rule, B, G, V, sampled, dtype):
    args = example(0, B, G, V, sampled, dtype, MIXED if B > 1 else [RowParams(0.9, top_k=1000, top_p=0.95)])
    assert decide(implementation, rule, args) == decide("reference", rule, args)


SHAPE = (9, 3, 8193)
"""That of the special cases: rows and vocabulary spill over into a last tile of one."""


def greedy_drafts(logits, sign=1):
    return (sign * logits[:, :-1]).argmax(axis=-1).astype(np.int32)


SPECIAL = {
    "random": lambda logits, accept, recover: {},
    "all accepted": lambda logits, accept, recover: {"drafts": greedy_drafts(logits), "accept_uniforms": accept * 0},
    "first rejected": lambda logits, accept, recover: {
        "drafts": greedy_drafts(logits, -1),
        "draft_probs": softmax(-logits[:, :-1]),
    },
    "forbidden tokens": lambda logits, accept, recover: {
        "logits": filled(logits, np.s_[..., ::3], np.s_[2, :, 5:], value=-np.inf)
    },
    "masked by a number": lambda logits, accept, recover: {"logits": filled(logits, np.s_[..., ::3], value=-3e38)},
    # Low enough for peak / temperature to have no digits left for what is added to it.
    "cold": lambda logits, accept, recover: {
        "logits": logits + 500,
        "rows": truncation([RowParams(0.05), RowParams(0.02, top_k=3), RowParams(0.1, top_p=0.9)] * 3),
    },
    "one finite logit": lambda logits, accept, recover: {
        "logits": filled(logits - np.inf, np.s_[..., 4321], value=2.0)
    },
    "ties": lambda logits, accept, recover: {"logits": logits.round()},
    "large logits": lambda logits, accept, recover: {"logits": logits * 1e4},
    # What rounding does: the drafts' laws lie a little above the target's everywhere, and a draft is rejected.
    "no residual": lambda logits, accept, recover: {
        "draft_probs": softmax(logits[:, :-1]) * np.float32(1.001),
        "accept_uniforms": accept * 0 + TOP,
        "rows": truncation([RowParams()] * len(logits)),
    },
    "uniforms at the top": lambda logits, accept, recover: {"recover_uniforms": recover * 0 + TOP},
    "uniforms at zero": lambda logits, accept, recover: {
        "recover_uniforms": recover * 0,
        "accept_uniforms": accept * 0,
    },
    "a broken drafter": lambda logits, accept, recover: {"draft_probs": np.full_like(logits[:, :-1], np.nan)},
    "all greedy": lambda logits, accept, recover: {"rows": truncation([RowParams(0.0)] * len(logits))},
}


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("case", SPECIAL)
def test_a_kernel_decides_special_cases_as_the_reference_does(implementation, rule, case):
    args = example(1, *SHAPE)
    args = changed(args, **SPECIAL[case](args[0], *args[3:5]))
    num_accepted, next_token = decide(implementation, rule, args)
    assert (num_accepted, next_token) == decide("reference", rule, args)
    if case == "all accepted":
        assert num_accepted == [SHAPE[1]] * SHAPE[0]
    if case == "first rejected":
        assert num_accepted == [0] * SHAPE[0]


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_token_behind_the_last_full_chunk_can_be_drawn_and_none_behind_the_vocabulary(implementation):
    B, _, V = SHAPE
    args = example(2, *SHAPE, params=[RowParams(), RowParams(top_k=1), RowParams(top_p=0.5)])
    logits = filled(args[0], np.s_[..., V - 1], value=60.0)
    for uniform in (0.0, TOP):
        args = changed(args, logits=logits, drafts=args[1] * 0, recover_uniforms=args[4] * 0 + uniform)
        assert decide(implementation, "residual", args) == ([0] * B, [V - 1] * B)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("broken", ["logits", "draft_probs"])
def test_a_row_of_nan_ends_with_some_token_and_disturbs_no_other_row(implementation, rule, broken):
    args = example(1, *SHAPE)
    num_accepted, next_token = decide(implementation, rule, args)
    index = ("logits", "draft_probs").index(broken) * 2
    spoilt = changed(args, **{broken: filled(args[index], np.s_[2:4], value=np.nan)})
    num_spoilt, token_spoilt = decide(implementation, rule, spoilt)
    for row in range(SHAPE[0]):
        if row in (2, 3):
            assert num_spoilt[row] == 0 and 0 <= token_spoilt[row] < SHAPE[2]
        else:
            assert (num_spoilt[row], token_spoilt[row]) == (num_accepted[row], next_token[row])


def test_what_the_memory_holds_behind_the_vocabulary_counts_for_nothing():
    """All logits are so small that a zero behind them would win."""
    args = example(4, 1, 1, 100, sampled=False, params=[RowParams(top_k=5, top_p=0.9)])
    args = changed(args, logits=args[0] - 50)
    zeros = pltpu.InterpretParams(uninitialized_memory="zero")
    assert decide("tpu", "residual", args, zeros) == decide("reference", "residual", args)


def test_a_vocabulary_too_large_for_the_tpu_kernel_is_refused():
    _, *rest = jax.tree.map(jnp.asarray, example(0, 1, 1, 8, sampled=False))
    with pytest.raises(NotImplementedError, match="300000"):
        rejection_sample(jnp.zeros((1, 2, 300_000)), *rest, implementation="tpu", interpret=True)


VOCAB, DRAFTS = 5, 2


def cells(rule, laws, proposed, drafts):
    """Cells of uniforms on which a verdict is constant: (intervals to accept, to draw, num_accepted, next_token)."""
    anywhere = (0.25, 0.75)
    scale, scales, limits = 1.0, [1.0], []
    for i, draft in enumerate(drafts):
        ratio = laws[i][draft] / proposed[i][draft]
        limits.append(min(1.0, ratio))
        scale = min(1.0, scale * ratio)
        scales.append(scale)
    rests = [np.maximum(law - q, 0) for law, q in zip(laws, [*proposed, np.zeros(VOCAB)], strict=True)]
    if rule == "block":
        rests = [np.maximum(s * law - q, 0) for s, law, q in zip(scales, laws, [*proposed, 0], strict=True)]
        limits = [rest.sum() / max(rest.sum() + 1 - s, 1e-30) for rest, s in zip(rests[1:], scales[1:], strict=True)]
    for n in range(DRAFTS + 1):
        accept, draws = [anywhere] * DRAFTS, [anywhere] * (DRAFTS + 1)
        rest, hits = rests[n], range(VOCAB)
        if rule == "residual":
            accept[:n] = [(0.0, limit) for limit in limits[:n]]
            accept[n : n + 1] = [(limit, 1.0) for limit in limits[n : n + 1]]
        elif rule == "block":
            accept[n:] = [(limit, 1.0) for limit in limits[n:]]
            accept[n - 1 : n] = [(0.0, limit) for limit in limits[n - 1 : n]] if n else []
        else:
            marks = [np.concatenate([[0], np.cumsum(law)]) for law in laws]
            draws[:n] = [tuple(marks[i][drafts[i] : drafts[i] + 2]) for i in range(n)]
            rest, hits = laws[n], [token for token in range(VOCAB) if n == DRAFTS or token != drafts[n]]
        marks = np.concatenate([[0], np.cumsum(rest) / max(rest.sum(), 1e-30)])
        for token in hits:
            draws[n] = tuple(marks[token : token + 2])
            yield list(accept), list(draws), n, token


def volume(intervals):
    """That of a cell; where a uniform does not matter its interval is (0.25, 0.75) and does not count."""
    return np.prod([1.0 if interval == (0.25, 0.75) else interval[1] - interval[0] for interval in intervals])


@pytest.mark.exact
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rule", RULES)
def test_the_law_of_the_next_tokens_is_the_targets(implementation, rule):
    """All drafts and all cells of the uniforms, each evaluated near both ends, with mixed parameters: exact."""
    rng = np.random.RandomState(3)
    logits = rng.randn(len(MIXED), DRAFTS + 1, VOCAB).astype(np.float32) * 1.5
    proposed = rng.dirichlet(np.ones(VOCAB) * 2, (len(MIXED), DRAFTS))
    laws = [[truncated(x, params) for x in position] for position, params in zip(logits, MIXED, strict=True)]
    found = []
    for which, drafts in itertools.product(range(len(MIXED)), itertools.product(range(VOCAB), repeat=DRAFTS)):
        weight = np.prod([proposed[which, i, draft] for i, draft in enumerate(drafts)])
        for accept, draws, n, token in cells(rule, laws[which], proposed[which], drafts):
            mass = weight * volume(accept) * volume(draws)
            if mass > 1e-9:
                found.append((which, drafts, accept, draws, mass, n, token))
    owner = np.array([cell[0] for cell in found])
    for side in (0, 1):

        def near(interval, side=side):
            margin = min(EDGE, (interval[1] - interval[0]) / 4)
            return interval[0] + margin if side == 0 else interval[1] - margin

        recover = np.full((len(found), DRAFTS + 1, 3), 0.5)
        recover[..., 2] = [[near(interval) for interval in cell[3]] for cell in found]
        args = (
            jnp.asarray(logits[owner]),
            jnp.asarray([cell[1] for cell in found], jnp.int32),
            jnp.asarray(proposed[owner], jnp.float32),
            jnp.asarray([[near(interval) for interval in cell[2]] for cell in found], jnp.float32),
            jnp.asarray(recover, jnp.float32),
            truncation([MIXED[which] for which in owner]),
        )
        num_accepted, next_token = decide(implementation, rule, args)
        assert (num_accepted, next_token) == ([cell[5] for cell in found], [cell[6] for cell in found])
        law = np.zeros((len(MIXED),) + (VOCAB,) * (DRAFTS + 1))
        for (which, drafts, _, _, mass, _, _), n, token in zip(found, num_accepted, next_token, strict=True):
            # What the round leaves open comes from the target.
            rest = functools.reduce(np.multiply.outer, laws[which][n + 1 :], mass)
            law[(which, *drafts[:n], token)] += rest
        for which in range(len(MIXED)):
            expected = functools.reduce(np.multiply.outer, laws[which])
            np.testing.assert_allclose(law[which], expected, rtol=0, atol=EDGE)


CHIPS = ["v5e:2x2", "v6e:2x2"]


@pytest.fixture
def place(monkeypatch):
    """chip -> the sharding on one that need not be there: libtpu compiles for it."""
    pytest.importorskip("libtpu")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")

    def sharding(chip):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
        return jax.sharding.SingleDeviceSharding(topology.devices[0])

    return sharding


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("rule", "B", "dtype"),
    [
        ("residual", 1, jnp.float32),
        ("residual", 1, jnp.bfloat16),
        ("residual", 8, jnp.float32),
        ("residual", 8, jnp.bfloat16),
        ("matching", 8, jnp.float32),
        ("block", 8, jnp.float32),
    ],
)
def test_the_kernel_compiles_for_a_tpu_and_reads_logits_from_where_the_matmul_wrote_them(place, chip, rule, B, dtype):
    G, V, width = 4, 128256, 256
    sharding = place(chip)

    def score(hidden, head, *rest):
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=dtype)
        return rejection_sample(logits, *rest, rule=rule, implementation="tpu")

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = Truncation(array((B,)), array((B,), jnp.int32), array((B,)), array((B,)))
    rest = array((B, G), jnp.int32), array((B, G, V)), array((B, G)), array((B, G + 1, 3)), rows
    text = jax.jit(score).lower(array((B, G + 1, width), dtype), array((width, V), dtype), *rest).compile().as_text()
    assert "tpu_custom_call" in text
    # What is moved before the kernel: not the logits and, but for matching, which does not use them, not draft_probs.
    moves = re.findall(r"= (.*) (?:copy|copy-start|transpose|reshape|slice-start|async-start)\(", text)
    if rule == "matching":
        moves = [shape for shape in moves if f"[{B},{G},{V}]" not in shape]
    assert not [shape for shape in moves if re.search(rf"\[[\d,]*\b{V}\b", shape) and f"[{width}," not in shape]


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


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_on_an_absent_tpu_the_kernel_takes_a_fifth_of_the_cycles_of_sorting_and_reads_logits_once(sampled):
    """Counted in compiled instructions; the README's table is of a vocabulary eight times as large."""
    pytest.importorskip("libtpu")
    kernel, sorting = (estimate("v6e:2x2", name, 8, vocab=16384, sampled=sampled) for name in ("tpu", "reference"))
    assert not kernel["uncounted"] and not sorting["uncounted"]
    assert kernel["cycles"] * 5 < sorting["cycles"]
    # Sampled drafts: the law of a rejected one is a fifth of a sequence's logits. The rest are small arrays.
    assert 1 + 0.2 * sampled < kernel["logits_reads"] < 1.01 + 0.2 * sampled
