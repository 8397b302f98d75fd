"""Both forms of the product, whatever its shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prfaas_jax.ops.thin_matmul import FEW_ROWS, matmul_transposed


@pytest.mark.parametrize(
    ("x", "w"),
    [
        *(((3, 5), (7, 5)), ((FEW_ROWS, 5), (7, 5)), ((2, 3, 5), (7, 5)), ((FEW_ROWS, 2, 5), (7, 5))),
        *(((2, 4, 3, 5), (2, 4, 9, 5)), ((1, 2, 200, 5), (1, 2, 9, 5))),
    ],
)
def test_is_x_times_w_transposed(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=x).astype(np.float32), rng.normal(size=w).astype(np.float32)
    got = jax.jit(matmul_transposed)(a, b)
    np.testing.assert_allclose(got, a @ np.swapaxes(b, -1, -2), atol=1e-5)


def test_accumulates_in_the_dtype_that_is_asked_for() -> None:
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((3, 8), jnp.bfloat16)
    assert matmul_transposed(x, w).dtype == jnp.bfloat16
    assert matmul_transposed(x, w, preferred_element_type=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("rows", [4, FEW_ROWS])
def test_for_few_rows_the_compiled_product_has_the_weights_on_its_left(rows: int) -> None:
    """The compiler swaps operands back if it may, and repacks the weights on every call."""
    compiled = jax.jit(matmul_transposed).lower(jnp.ones((rows, 64)), jnp.ones((256, 64))).compile().as_text()
    (dot,) = [line for line in compiled.splitlines() if " dot(" in line]
    assert (f"f32[256,{rows}]" in dot) == (rows < FEW_ROWS), dot
