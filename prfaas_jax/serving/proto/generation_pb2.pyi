from prfaas_jax.serving.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("token_ids", "text", "chat", "sampling", "max_new_tokens", "stop_strings", "want_logits", "placement", "allow_fallback", "ignore_eos", "request_id", "events_received", "held_by", "tenant")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    WANT_LOGITS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    token_ids: TokenIds
    text: str
    chat: Chat
    sampling: _common_pb2.Sampling
    max_new_tokens: int
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    want_logits: bool
    placement: Placement
    allow_fallback: bool
    ignore_eos: bool
    request_id: str
    events_received: int
    held_by: str
    tenant: str
    def __init__(self, token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop_strings: _Optional[_Iterable[str]] = ..., want_logits: bool = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., allow_fallback: bool = ..., ignore_eos: bool = ..., request_id: _Optional[str] = ..., events_received: _Optional[int] = ..., held_by: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConvertRequest(_message.Message):
    __slots__ = ("to",)
    TO_FIELD_NUMBER: _ClassVar[int]
    to: str
    def __init__(self, to: _Optional[str] = ...) -> None: ...

class ConvertReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    class Message(_message.Message):
        __slots__ = ("role", "content")
        ROLE_FIELD_NUMBER: _ClassVar[int]
        CONTENT_FIELD_NUMBER: _ClassVar[int]
        role: str
        content: str
        def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Chat.Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Chat.Message, _Mapping]]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("prefill_address", "reason", "route_s", "alternatives", "prefill_cluster", "decode_cluster", "account", "again")
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUTE_S_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DECODE_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    prefill_address: str
    reason: str
    route_s: float
    alternatives: _containers.RepeatedScalarFieldContainer[str]
    prefill_cluster: str
    decode_cluster: str
    account: str
    again: bool
    def __init__(self, prefill_address: _Optional[str] = ..., reason: _Optional[str] = ..., route_s: _Optional[float] = ..., alternatives: _Optional[_Iterable[str]] = ..., prefill_cluster: _Optional[str] = ..., decode_cluster: _Optional[str] = ..., account: _Optional[str] = ..., again: bool = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("token", "usage", "placed")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    token: TokenOut
    usage: Usage
    placed: Placed
    def __init__(self, token: _Optional[_Union[TokenOut, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., placed: _Optional[_Union[Placed, _Mapping]] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("decode_address", "prefill_cluster", "reason", "attempt")
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    decode_address: str
    prefill_cluster: str
    reason: str
    attempt: int
    def __init__(self, decode_address: _Optional[str] = ..., prefill_cluster: _Optional[str] = ..., reason: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class TokenOut(_message.Message):
    __slots__ = ("token", "text", "prefilled")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    token: _common_pb2.Token
    text: str
    prefilled: Prefilled
    def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., text: _Optional[str] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("prefill_address", "failures", "account")
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    prefill_address: str
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    account: str
    def __init__(self, prefill_address: _Optional[str] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., account: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("placement", "prefill_address", "reason", "prompt_tokens", "output_tokens", "finish_reason", "fallbacks", "fallback_reason", "kv_bytes_moved", "kv_bytes_skipped", "kv_bytes_resent", "kv_bytes_expected", "tokens_recomputed", "parts", "ttft_s", "itl_s", "spans", "decode_address", "resumes", "kv_bytes_wire", "codec", "exposed_bound_s", "link", "prefill_cluster", "decode_cluster", "attempts", "failures", "clock_error_s", "account", "events_before")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RESENT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_S_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_WIRE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_BOUND_S_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DECODE_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    CLOCK_ERROR_S_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    placement: str
    prefill_address: str
    reason: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    fallbacks: int
    fallback_reason: str
    kv_bytes_moved: int
    kv_bytes_skipped: int
    kv_bytes_resent: int
    kv_bytes_expected: int
    tokens_recomputed: int
    parts: TtftParts
    ttft_s: float
    itl_s: _containers.RepeatedScalarFieldContainer[float]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    decode_address: str
    resumes: int
    kv_bytes_wire: int
    codec: str
    exposed_bound_s: float
    link: Link
    prefill_cluster: str
    decode_cluster: str
    attempts: int
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    clock_error_s: float
    account: str
    events_before: int
    def __init__(self, placement: _Optional[str] = ..., prefill_address: _Optional[str] = ..., reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., fallbacks: _Optional[int] = ..., fallback_reason: _Optional[str] = ..., kv_bytes_moved: _Optional[int] = ..., kv_bytes_skipped: _Optional[int] = ..., kv_bytes_resent: _Optional[int] = ..., kv_bytes_expected: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., parts: _Optional[_Union[TtftParts, _Mapping]] = ..., ttft_s: _Optional[float] = ..., itl_s: _Optional[_Iterable[float]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., decode_address: _Optional[str] = ..., resumes: _Optional[int] = ..., kv_bytes_wire: _Optional[int] = ..., codec: _Optional[str] = ..., exposed_bound_s: _Optional[float] = ..., link: _Optional[_Union[Link, _Mapping]] = ..., prefill_cluster: _Optional[str] = ..., decode_cluster: _Optional[str] = ..., attempts: _Optional[int] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., clock_error_s: _Optional[float] = ..., account: _Optional[str] = ..., events_before: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("address", "phase", "code")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    address: str
    phase: str
    code: str
    def __init__(self, address: _Optional[str] = ..., phase: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("prefill_address", "bytes_per_s", "transfer_bytes_per_s", "rtt_s", "goodput_bytes_per_s", "spare_bytes_per_s", "stalls", "stalled_s", "age_s", "pending", "pending_bytes")
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SPARE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    STALLS_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    prefill_address: str
    bytes_per_s: float
    transfer_bytes_per_s: float
    rtt_s: float
    goodput_bytes_per_s: float
    spare_bytes_per_s: float
    stalls: int
    stalled_s: float
    age_s: float
    pending: int
    pending_bytes: float
    def __init__(self, prefill_address: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., transfer_bytes_per_s: _Optional[float] = ..., rtt_s: _Optional[float] = ..., goodput_bytes_per_s: _Optional[float] = ..., spare_bytes_per_s: _Optional[float] = ..., stalls: _Optional[int] = ..., stalled_s: _Optional[float] = ..., age_s: _Optional[float] = ..., pending: _Optional[int] = ..., pending_bytes: _Optional[float] = ...) -> None: ...

class TtftParts(_message.Message):
    __slots__ = ("route", "queue", "prefill", "exposed_transfer", "admit", "first_step")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ADMIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    route: float
    queue: float
    prefill: float
    exposed_transfer: float
    admit: float
    first_step: float
    def __init__(self, route: _Optional[float] = ..., queue: _Optional[float] = ..., prefill: _Optional[float] = ..., exposed_transfer: _Optional[float] = ..., admit: _Optional[float] = ..., first_step: _Optional[float] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "start_s", "end_s", "site")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_s: float
    end_s: float
    site: str
    def __init__(self, name: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., site: _Optional[str] = ...) -> None: ...

class GenerationStatus(_message.Message):
    __slots__ = ("engine", "model_fingerprint", "cache_fingerprint", "streams", "fallbacks", "draining", "has_tokenizer", "served", "failed", "backends", "links", "boot", "standby", "accepted", "decisions", "conversions", "control", "ways")
    class ServedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class DecisionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    CONVERSIONS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    engine: _common_pb2.EngineStatus
    model_fingerprint: str
    cache_fingerprint: str
    streams: int
    fallbacks: int
    draining: bool
    has_tokenizer: bool
    served: _containers.ScalarMap[str, int]
    failed: _containers.ScalarMap[str, int]
    backends: _containers.RepeatedCompositeFieldContainer[Backend]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    boot: str
    standby: bool
    accepted: _containers.RepeatedScalarFieldContainer[str]
    decisions: _containers.ScalarMap[str, int]
    conversions: int
    control: _containers.RepeatedScalarFieldContainer[str]
    ways: _containers.RepeatedCompositeFieldContainer[Way]
    def __init__(self, engine: _Optional[_Union[_common_pb2.EngineStatus, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., cache_fingerprint: _Optional[str] = ..., streams: _Optional[int] = ..., fallbacks: _Optional[int] = ..., draining: bool = ..., has_tokenizer: bool = ..., served: _Optional[_Mapping[str, int]] = ..., failed: _Optional[_Mapping[str, int]] = ..., backends: _Optional[_Iterable[_Union[Backend, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ..., boot: _Optional[str] = ..., standby: bool = ..., accepted: _Optional[_Iterable[str]] = ..., decisions: _Optional[_Mapping[str, int]] = ..., conversions: _Optional[int] = ..., control: _Optional[_Iterable[str]] = ..., ways: _Optional[_Iterable[_Union[Way, _Mapping]]] = ...) -> None: ...

class Backend(_message.Message):
    __slots__ = ("role", "address", "healthy", "why", "engine", "cluster", "breaker", "turned_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    TURNED_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    address: str
    healthy: bool
    why: str
    engine: _common_pb2.EngineStatus
    cluster: str
    breaker: str
    turned_s: float
    def __init__(self, role: _Optional[str] = ..., address: _Optional[str] = ..., healthy: bool = ..., why: _Optional[str] = ..., engine: _Optional[_Union[_common_pb2.EngineStatus, _Mapping]] = ..., cluster: _Optional[str] = ..., breaker: _Optional[str] = ..., turned_s: _Optional[float] = ...) -> None: ...

class Way(_message.Message):
    __slots__ = ("region", "prefill_address", "breaker")
    REGION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    region: str
    prefill_address: str
    breaker: str
    def __init__(self, region: _Optional[str] = ..., prefill_address: _Optional[str] = ..., breaker: _Optional[str] = ...) -> None: ...
