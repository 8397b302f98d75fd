from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "stop_token_ids")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "logits")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    logits: bytes
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., logits: _Optional[bytes] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("running", "waiting", "pages_free", "pages_total", "compiles_after_warmup", "local_prefills", "tokens_prefilled", "tokens_decoded", "state_slots_free", "state_slots_total", "instances", "decode_slots", "decode_waiting")
    class PrefillInstance(_message.Message):
        __slots__ = ("free_in_s", "jobs", "fresh")
        FREE_IN_S_FIELD_NUMBER: _ClassVar[int]
        JOBS_FIELD_NUMBER: _ClassVar[int]
        FRESH_FIELD_NUMBER: _ClassVar[int]
        free_in_s: float
        jobs: int
        fresh: int
        def __init__(self, free_in_s: _Optional[float] = ..., jobs: _Optional[int] = ..., fresh: _Optional[int] = ...) -> None: ...
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPILES_AFTER_WARMUP_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PREFILLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_DECODED_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    DECODE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DECODE_WAITING_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    pages_free: int
    pages_total: int
    compiles_after_warmup: int
    local_prefills: int
    tokens_prefilled: int
    tokens_decoded: int
    state_slots_free: int
    state_slots_total: int
    instances: _containers.RepeatedCompositeFieldContainer[EngineStatus.PrefillInstance]
    decode_slots: int
    decode_waiting: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_total: _Optional[int] = ..., compiles_after_warmup: _Optional[int] = ..., local_prefills: _Optional[int] = ..., tokens_prefilled: _Optional[int] = ..., tokens_decoded: _Optional[int] = ..., state_slots_free: _Optional[int] = ..., state_slots_total: _Optional[int] = ..., instances: _Optional[_Iterable[_Union[EngineStatus.PrefillInstance, _Mapping]]] = ..., decode_slots: _Optional[int] = ..., decode_waiting: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("period_s",)
    PERIOD_S_FIELD_NUMBER: _ClassVar[int]
    period_s: float
    def __init__(self, period_s: _Optional[float] = ...) -> None: ...
