"""Decode attention: one new token per row over its paged cache, by named implementations.

    xla         plain jnp, any platform and shape; the current token is an argument and need not be in the pool
    pallas_gpu  the jax wheel's Triton kernel; the current token must be in the pool
    pallas_tpu  the jax wheel's Mosaic kernel; the current token must be in the pool

Both kernels want keys and values of one width, and know no sinks.
"""

from jaxtyping import Array, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.paged_attention import pallas_gpu, pallas_tpu, reference

IMPLEMENTATIONS = ("xla", "pallas_gpu", "pallas_tpu")

_KERNELS = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
_KERNEL_OF_PLATFORM = {"gpu": "pallas_gpu", "cuda": "pallas_gpu", "tpu": "pallas_tpu"}


def needs_current_in_pool(implementation: str) -> bool:
    """Whether the caller must have written k_new and v_new at position `lengths[b]` before the call."""
    return _known(implementation) in _KERNELS


def supports(
    implementation: str, *, head_dim: int, page_size: int, group: int, value_dim: int | None = None, sinks: bool = False
) -> str | None:
    """None when the implementation takes this shape, otherwise the reason why not.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        head_dim: width of queries and keys.
        page_size: tokens of a page.
        group: N // K.
        value_dim: width of values; None is `head_dim`.
        sinks: whether a sink per query head joins the softmax.

    Raises:
        InvalidInput: unknown implementation, or no query head per kv head.
    """
    if group < 1:
        raise InvalidInput("group", group, "at least one query head per kv head")
    if not needs_current_in_pool(implementation):
        return None
    if value_dim not in (None, head_dim):
        return f"value_dim={value_dim} is not head_dim={head_dim}"
    if sinks:
        return "it has no sinks"
    # Neither kernel minds the group: one pads it, the other has a layout for groups that are no multiple of 8.
    return _KERNELS[implementation].unsupported(head_dim=head_dim, page_size=page_size)


def default_implementation(
    platform: str, *, head_dim: int, page_size: int, group: int, value_dim: int | None = None, sinks: bool = False
) -> tuple[str, str]:
    """(implementation, reason) for a jax platform: its kernel where the shape allows, otherwise "xla"."""
    kernel = _KERNEL_OF_PLATFORM.get(platform)
    if kernel is None:
        return "xla", f"platform {platform} has no paged attention kernel"
    if reason := supports(kernel, head_dim=head_dim, page_size=page_size, group=group, value_dim=value_dim, sinks=sinks):
        return "xla", f"{kernel} does not take this shape: {reason}"
    return kernel, f"the kernel for platform {platform}"


def paged_attention(
    q: Float[Array, "B N H"],
    k_new: Float[Array, "B K H"],
    v_new: Float[Array, "B K Hv"],
    k_pool: Float[Array, "K X page_size H"],
    v_pool: Float[Array, "K X page_size Hv"],
    table: Int[Array, "B MP"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    pages_per_layer: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B N Hv"]:
    """Attention of one new token per row over its `lengths[b]` cached tokens and itself.

    Shard-local. Query head n uses kv head n // (N // K). The pool is only read, and never sliced by layer (that would copy it).
    Rows of length 0 with a dummy table are harmless.

    Args:
        q: queries, already rotated.
        k_new: the current token's keys.
        v_new: the current token's values.
        k_pool: pages of all layers, X = L * pages_per_layer; page 0 of each layer is a dummy.
        v_pool: like `k_pool`, of the width of values.
        table: page within a layer of each page of each row; unused entries 0.
        lengths: tokens cached BEFORE the current one.
        layer: layer to read, may be traced.
        pages_per_layer: P.
        scale: factor on q . k, usually H ** -0.5.
        sinks: a logit per query head that joins the softmax and takes no value; "xla" only.
        implementation: one of `IMPLEMENTATIONS`; None is "xla", the only one that asks nothing of the caller. The others read
            the current token from the pool (`needs_current_in_pool`).
        interpret: run a kernel in the Pallas interpreter, for tests on CPU.

    Raises:
        InvalidInput: unknown implementation, or one that does not take this shape.
    """
    name = implementation or "xla"
    group, page_size = q.shape[1] // k_new.shape[1], k_pool.shape[2]
    shape = {"head_dim": q.shape[-1], "page_size": page_size, "group": group, "value_dim": v_pool.shape[-1]}
    if reason := supports(name, **shape, sinks=sinks is not None):
        raise InvalidInput("implementation", name, f"another one for this shape: {reason}")
    if name == "xla":
        return reference.paged_attention(
            q, k_new, v_new, k_pool, v_pool, table, lengths, layer, pages_per_layer=pages_per_layer, scale=scale, sinks=sinks
        )
    return _KERNELS[name].paged_attention(
        q, k_pool, v_pool, table, lengths, layer, pages_per_layer=pages_per_layer, scale=scale, interpret=interpret
    )


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise InvalidInput("implementation", implementation, f"one of {IMPLEMENTATIONS}")
    return implementation
