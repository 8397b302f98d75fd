"""Between the engine's plain types and the control plane's messages."""

from collections.abc import Sequence

import grpc
import numpy as np

from prfaas_jax.engine.api import EngineStatus, PrefillEngine, SamplingParams, Token
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput, PeerMismatch, PrfaasError
from prfaas_jax.kvcache.codecs import AS_CACHED, CacheCodec
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.serving.proto import common_pb2, prefill_pb2

_OPTIONAL = ("temperature", "top_k", "top_p", "seed")


def sampling_to_proto(sampling: SamplingParams) -> common_pb2.Sampling:
    """All fields but max_new_tokens and return_logits, which are fields of the requests."""
    return common_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
    )


def sampling_from_proto(message: common_pb2.Sampling, max_new_tokens: int, return_logits: bool) -> SamplingParams:
    """Absent fields take the defaults of SamplingParams; raises InvalidInput as that does."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    return SamplingParams(**given, stop_token_ids=tuple(message.stop_token_ids), max_new_tokens=max_new_tokens, return_logits=return_logits)


def token_to_proto(token: Token) -> common_pb2.Token:
    """Logits, when there are any, as little-endian float32."""
    logits = b"" if token.logits is None else np.asarray(token.logits, "<f4").tobytes()
    return common_pb2.Token(id=token.token, logprob=token.logprob, logits=logits)


def token_from_proto(message: common_pb2.Token) -> Token:
    """Inverse of `token_to_proto`; logits become a read-only float32 array [V]."""
    logits = np.frombuffer(message.logits, "<f4") if message.logits else None
    return Token(message.id, message.logprob, logits)


def key_to_proto(key: SegmentKey, ready_s: float) -> prefill_pb2.SegmentReady:
    """A segment's place, without its bytes, and when it was handed out."""
    return prefill_pb2.SegmentReady(
        ready_s=ready_s,
        group=key.group,
        tensor=key.tensor,
        layers_start=key.layers[0],
        layers_stop=key.layers[1],
        tokens_start=key.tokens[0],
        tokens_stop=key.tokens[1],
        heads_start=key.heads[0],
        heads_stop=key.heads[1],
    )


def key_from_proto(message: prefill_pb2.SegmentReady) -> SegmentKey:
    """Inverse of `key_to_proto`; nothing is judged here."""
    layers, tokens = (message.layers_start, message.layers_stop), (message.tokens_start, message.tokens_stop)
    return SegmentKey(message.group, message.tensor, layers, tokens, (message.heads_start, message.heads_stop))


def status_to_proto(status: EngineStatus) -> common_pb2.EngineStatus:
    """Field by field."""
    return common_pb2.EngineStatus(
        running=status.running,
        waiting=status.waiting,
        pages_free=status.pages_free,
        pages_total=status.pages_total,
        compiles_after_warmup=status.compiles_after_warmup,
        local_prefills=status.local_prefills,
        tokens_prefilled=status.tokens_prefilled,
        tokens_decoded=status.tokens_decoded,
        state_slots_free=status.state_slots_free,
        state_slots_total=status.state_slots_total,
        instances=[common_pb2.EngineStatus.PrefillInstance(free_in_s=x.free_in_s, jobs=x.jobs, fresh=x.fresh) for x in status.instances],
        decode_slots=status.decode_slots,
        decode_waiting=status.decode_waiting,
    )


def manifest(spec: CacheSpec, length: int, prefix: int = 0, codec: CacheCodec = AS_CACHED) -> prefill_pb2.Manifest:
    """What a request of `length` tokens leaves behind, in canonical bytes, and how much travels when `prefix` tokens are there already."""
    wire_bytes = codec.wire_spec(spec).bytes(length, prefix)
    groups = [
        prefill_pb2.Manifest.Group(kind=group.cache.kind, layers=len(group.layers), bytes=group.bytes(length)) for group in spec.groups
    ]
    return prefill_pb2.Manifest(length=length, bytes=spec.bytes(length), groups=groups, prefix=prefix, wire_bytes=wire_bytes)


def agree_codec(wanted: Sequence[str], engine: PrefillEngine) -> CacheCodec:
    """The first of the wanted codecs that an engine has programs for; as cached when none is asked for.

    Raises InvalidInput for one that is malformed, or when there is none.
    """
    for text in wanted:
        codec = CacheCodec.parse(text)
        if codec.names(engine.spec) <= {*engine.codecs}:
            return codec
    if wanted:
        raise InvalidInput("codecs", list(wanted), f"one made of {('none', *engine.codecs)}, which this server has programs for")
    return AS_CACHED


def check_peer(pairs: Sequence[tuple[str, object, object]]) -> None:
    """Raises PeerMismatch for the first (field, ours, theirs) that differ."""
    for field, ours, theirs in pairs:
        if ours != theirs:
            raise PeerMismatch(field, ours, theirs)


def code_of(error: PrfaasError) -> grpc.StatusCode:
    """The gRPC status that says what kind of error this is."""
    match error:
        case InvalidInput():
            return grpc.StatusCode.INVALID_ARGUMENT
        case Exhausted():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case PeerMismatch():
            return grpc.StatusCode.FAILED_PRECONDITION
        case EngineFailed():
            return grpc.StatusCode.INTERNAL
        case _:
            return grpc.StatusCode.UNAVAILABLE
