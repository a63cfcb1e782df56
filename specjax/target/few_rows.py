"""A few activations times a large matrix, on CPUs: what a round's target spends its time on.

Reading the matrix is what one such product should cost. XLA (0.10) packs it anew for each product of more than one row,
which doubles that, however few the rows are. Here the sums over products are written out, so that one loop over the
matrix serves all rows, also a single one, which XLA multiplies no faster. XLA compiles such sums well only in one form;
what it would do with others is said below. All of this is for the time that it takes; the result is the product.
"""

import math

import jax
import jax.numpy as jnp

MOST = 24
"""Rows beyond which a matrix product is as fast."""

TOGETHER = 8
"""Up to so many rows, all are summed for one output after the other: more would not stay in a core's nearest cache."""

BLOCK = 64
"""Beyond, each pair of rows is summed for a block of outputs before the next: the largest common divisor with this."""

LEAST_BLOCK = 16
"""Where blocks would be smaller, a matrix product of more than TOGETHER rows is as fast."""


def suits(num_rows: int, num_outputs: int) -> bool:
    """Whether times is faster than a matrix product."""
    return num_rows <= (MOST if math.gcd(num_outputs, BLOCK) >= LEAST_BLOCK else TOGETHER)


def times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """float32[T, N] from float32[T, I] and float32 or bfloat16[N, I].

    Two rows at a time are the real and the imaginary part of complex numbers: XLA lets sums be vectorised only where
    adding is the only thing that a reduction does, and this adds two at once.
    """
    num, width = x.shape
    block = 1 if num <= TOGETHER else math.gcd(len(matrix), BLOCK)
    if matrix.dtype != x.dtype:
        # Widened number by number, as it is read: XLA would do it once and for all before a loop that this is in.
        x, matrix = jax.lax.optimization_barrier((x, matrix))
        matrix = matrix.astype(x.dtype)
    x, zeros = _in_memory(jnp.pad(x, ((0, num % 2), (0, 0))))
    # The loops are nested in this order.
    shape = len(matrix) // block, len(x) // 2, block, width
    weights = jax.lax.broadcast_in_dim(matrix.reshape(-1, block, width), shape, (0, 2, 3))
    pairs = (jax.lax.broadcast_in_dim(part, shape, (1, 3)) * weights for part in (x[0::2], x[1::2]))
    # A constant to begin with would leave the two sums in one register that is not a vector.
    begin = jax.lax.complex(zeros[0, 0], zeros[0, 0])
    sums, zeros = _sum(jax.lax.complex(*pairs), begin, axis=3)
    rows = jnp.stack([sums.real + zeros, sums.imag], axis=2).transpose(1, 2, 0, 3)
    return rows.reshape(len(x), len(matrix))[:num]


def _in_memory(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x, and zeros that XLA does not know to be zeros.

    XLA computes what a loop reads inside the loop wherever that is cheap, but for sums of several arrays: so this keeps
    it from norming an activation, or evaluating its SwiGLU, once for every output.
    """
    return _sum(jnp.stack([x, jnp.zeros_like(x)]), jnp.zeros((), x.dtype), axis=0)


def _sum(x: jax.Array, begin: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The sum along an axis, and zeros.

    Because of the zeros it is a sum of two arrays, which XLA leaves as it is; one of a single array it would cut into
    windows, and write everything that is to be added to memory first.
    """
    nothing = jnp.zeros(x.shape, jnp.float32)

    def add(so_far: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return so_far[0] + new[0], so_far[1]

    sums, zeros = jax.lax.reduce((x, nothing), (begin, jnp.zeros((), jnp.float32)), add, (axis,))
    return sums, zeros
