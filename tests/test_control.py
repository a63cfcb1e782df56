"""Control flow inside compiled programs: what runs, and where XLA leaves it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.control import in_narrowest, run_if, switch_in_place

X, W = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(12.0, dtype=np.float32).reshape(3, 4)


def of_captured(index, x, w):
    """Branches that read nothing of the operand."""
    return switch_in_place(index, [lambda _, scale=scale: (scale * x) @ w for scale in (1.0, 2.0, 3.0)], x @ w * 0)


def conditional(index, x, w):
    return run_if(index == 1, lambda carry: ((2.0 * x) @ w, carry), x)[0]


def without_operand(index, x, w):
    return in_narrowest(lambda width, _: x[:, :width] @ w[:width], (1, 2, 3), index + 1, jnp.zeros((2, 4)))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_chosen_branch_counts(index):
    at = jnp.int32(index)
    np.testing.assert_array_equal(of_captured(at, X, W), (index + 1) * X @ W)
    np.testing.assert_array_equal(conditional(at, X, W), 2 * X @ W if index == 1 else np.zeros((2, 4)))
    width = index + 1
    np.testing.assert_array_equal(without_operand(at, X, W), X[:, :width] @ W[:width])


@pytest.mark.parametrize("function", [of_captured, conditional, without_operand])
def test_xla_computes_nothing_of_a_branch_that_is_not_taken(function):
    """It takes what does not change in a loop out of it, also where the loop has no trips."""
    text = jax.jit(function).lower(jnp.int32(0), X + 0.5, W).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    moved = [line for line in entry.splitlines() if "while/body" in line]
    assert "while/body" in text and not moved
