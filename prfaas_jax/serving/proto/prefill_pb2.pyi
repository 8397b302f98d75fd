from prfaas_jax.serving.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "cache_fingerprint", "prompt", "sampling", "want_logits", "decode_has_tokens", "codecs", "resume_ticket", "resume_epoch", "request_id", "site")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    WANT_LOGITS_FIELD_NUMBER: _ClassVar[int]
    DECODE_HAS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    RESUME_TICKET_FIELD_NUMBER: _ClassVar[int]
    RESUME_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    cache_fingerprint: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    want_logits: bool
    decode_has_tokens: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    resume_ticket: bytes
    resume_epoch: int
    request_id: str
    site: str
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., cache_fingerprint: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., want_logits: bool = ..., decode_has_tokens: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., resume_ticket: _Optional[bytes] = ..., resume_epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., site: _Optional[str] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("accepted", "progress", "segment_ready", "first_token", "done", "failed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_READY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    segment_ready: SegmentReady
    first_token: FirstToken
    done: Done
    failed: Failed
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., segment_ready: _Optional[_Union[SegmentReady, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("ticket", "epoch", "manifest", "lanes", "codec", "received_s", "sent_s", "submitted_s")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_S_FIELD_NUMBER: _ClassVar[int]
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_S_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    epoch: int
    manifest: Manifest
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    codec: str
    received_s: float
    sent_s: float
    submitted_s: float
    def __init__(self, ticket: _Optional[bytes] = ..., epoch: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., codec: _Optional[str] = ..., received_s: _Optional[float] = ..., sent_s: _Optional[float] = ..., submitted_s: _Optional[float] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("length", "bytes", "groups", "prefix", "wire_bytes")
    class Group(_message.Message):
        __slots__ = ("kind", "layers", "bytes")
        KIND_FIELD_NUMBER: _ClassVar[int]
        LAYERS_FIELD_NUMBER: _ClassVar[int]
        BYTES_FIELD_NUMBER: _ClassVar[int]
        kind: str
        layers: int
        bytes: int
        def __init__(self, kind: _Optional[str] = ..., layers: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    length: int
    bytes: int
    groups: _containers.RepeatedCompositeFieldContainer[Manifest.Group]
    prefix: int
    wire_bytes: int
    def __init__(self, length: _Optional[int] = ..., bytes: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Manifest.Group, _Mapping]]] = ..., prefix: _Optional[int] = ..., wire_bytes: _Optional[int] = ...) -> None: ...

class Lane(_message.Message):
    __slots__ = ("address", "heads_start", "heads_stop", "epoch")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEADS_START_FIELD_NUMBER: _ClassVar[int]
    HEADS_STOP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    address: str
    heads_start: int
    heads_stop: int
    epoch: int
    def __init__(self, address: _Optional[str] = ..., heads_start: _Optional[int] = ..., heads_stop: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("tokens", "at_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    at_s: float
    def __init__(self, tokens: _Optional[int] = ..., at_s: _Optional[float] = ...) -> None: ...

class SegmentReady(_message.Message):
    __slots__ = ("group", "tensor", "layers_start", "layers_stop", "tokens_start", "tokens_stop", "heads_start", "heads_stop", "ready_s")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    LAYERS_START_FIELD_NUMBER: _ClassVar[int]
    LAYERS_STOP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_STOP_FIELD_NUMBER: _ClassVar[int]
    HEADS_START_FIELD_NUMBER: _ClassVar[int]
    HEADS_STOP_FIELD_NUMBER: _ClassVar[int]
    READY_S_FIELD_NUMBER: _ClassVar[int]
    group: int
    tensor: int
    layers_start: int
    layers_stop: int
    tokens_start: int
    tokens_stop: int
    heads_start: int
    heads_stop: int
    ready_s: float
    def __init__(self, group: _Optional[int] = ..., tensor: _Optional[int] = ..., layers_start: _Optional[int] = ..., layers_stop: _Optional[int] = ..., tokens_start: _Optional[int] = ..., tokens_stop: _Optional[int] = ..., heads_start: _Optional[int] = ..., heads_stop: _Optional[int] = ..., ready_s: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: _common_pb2.Token
    def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("segments", "bytes", "queue_s", "prefill_s")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    segments: int
    bytes: int
    queue_s: float
    prefill_s: float
    def __init__(self, segments: _Optional[int] = ..., bytes: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("ticket", "epoch")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    epoch: int
    def __init__(self, ticket: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillStatus(_message.Message):
    __slots__ = ("engine", "model_fingerprint", "cache_fingerprint", "protocol_version", "tickets", "staged_bytes", "streams", "draining", "codecs", "boot", "standby", "accepted")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    engine: _common_pb2.EngineStatus
    model_fingerprint: str
    cache_fingerprint: str
    protocol_version: int
    tickets: int
    staged_bytes: int
    streams: int
    draining: bool
    codecs: _containers.RepeatedScalarFieldContainer[str]
    boot: str
    standby: bool
    accepted: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine: _Optional[_Union[_common_pb2.EngineStatus, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., cache_fingerprint: _Optional[str] = ..., protocol_version: _Optional[int] = ..., tickets: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., streams: _Optional[int] = ..., draining: bool = ..., codecs: _Optional[_Iterable[str]] = ..., boot: _Optional[str] = ..., standby: bool = ..., accepted: _Optional[_Iterable[str]] = ...) -> None: ...
