"""A cluster without a model: many instances with the times of a profile and real bytes, in one process and in real time.

Prompts and requests are queued and batched by the simulator's own pools, so a live system on such clusters and a simulation of it
differ by what is not played: messages, bytes on the wire, and the machine.
"""

import math

import numpy as np

from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.view import Load, Servers
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillInstance
from prfaas_jax.testing.pooled import Played
from prfaas_jax.testing.pooled_decode import PooledDecodeEngine
from prfaas_jax.testing.pooled_prefill import PooledPrefillEngine
from prfaas_jax.testing.realtime import RealTimeKernel


class ProfiledCluster:
    """Instances of one hardware behind a prefill engine and, if any of them decode, a decode engine; one thread runs both.

    Attributes:
        prefill_engine: takes prompts while there are prefill instances.
        decode_engine: None for a cluster that began without decode instances.
        kernel: its clock; `kernel.max_late_s` tells whether the machine keeps up.
    """

    def __init__(
        self,
        instance: Instance,
        spec: CacheSpec,
        fingerprint: str,
        *,
        prefill: int,
        decode: int,
        chunk: int,
        rows: int = 1,
        time_scale: float = 1.0,
        token_scale: int = 1,
        byte_scale: float = 1.0,
        convert_s: float = 0.0,
        vocab_size: int = 32_000,
        max_length: int = 1 << 20,
        max_queue: int = 1024,
        seed: int = 0,
        verify: bool = False,
    ):
        """Starts the thread.

        Args:
            instance: the times and the memory of each.
            spec: what the cache looks like that really moves.
            fingerprint: of the model that is played.
            prefill: instances that begin with prompts.
            decode: instances that begin with decoding.
            chunk: tokens per prefill step, a multiple of 64.
            rows: prompts per prefill step.
            time_scale: seconds of the profile per wall second.
            token_scale: tokens of the model that one live new token stands for; prompts are not scaled.
            byte_scale: bytes of `spec` per byte of the cache that `instance.kv_memory_bytes` is for; see `scaled_spec`.
            convert_s: seconds of the profile that a drained instance takes to change its role.
            vocab_size: ids are below it.
            max_length: prompt + max_new_tokens at most.
            max_queue: prompts, and requests outside the decode batches, that wait before more are refused.
            seed: of the cache's bytes.
            verify: whether every byte that the decode engine takes is compared; that none is missing or comes twice always is.

        Raises InvalidInput naming the argument.
        """
        for field, count in (("prefill", prefill), ("decode", decode)):
            if count < 0:
                raise InvalidInput(field, count, "a number of instances >= 0")
        if not prefill + decode:
            raise InvalidInput("prefill", prefill, "an instance that prefills, or one that decodes")
        if token_scale < 1:
            raise InvalidInput("token_scale", token_scale, "an integer >= 1")
        if not 0 < byte_scale < math.inf:
            raise InvalidInput("byte_scale", byte_scale, "a finite number above zero")
        if not 0 <= convert_s < math.inf:
            raise InvalidInput("convert_s", convert_s, "finite seconds >= 0")
        played = Played(spec, fingerprint, vocab_size, max_length, max_queue, seed)
        self.kernel = RealTimeKernel("profiled cluster", time_scale, self._ended)
        self._convert_s = convert_s
        servers = Servers((instance.name,), np.ones(1, bool), np.zeros(1, np.int64), Load.idle(1))
        self._prefill = PrefillPool(self.kernel, instance.name, instance, prefill, chunk, rows, servers, 0)
        self.prefill_engine = PooledPrefillEngine(self.kernel, played, self.close, self._prefill, chunk)
        self._decode: DecodePool | None = None
        self.decode_engine: PooledDecodeEngine | None = None
        if decode:
            self._decode = DecodePool(self.kernel, instance.name, instance, decode, self._done, servers, 0)
            pools = self._decode, self._prefill
            self.decode_engine = PooledDecodeEngine(
                self.kernel, played, self.close, *pools, token_scale=token_scale, byte_scale=byte_scale, verify=verify
            )
            self._decode.joined = self.decode_engine.joined
        self.kernel.start()

    def convert(self, to: str) -> None:
        """One instance of the other role takes nothing new, finishes what it has, and joins `to` ("prefill" or "decode") `convert_s` later.

        Returns when it has begun to drain; raises InvalidInput where none can change: one at least goes on decoding.
        """
        if to not in ("prefill", "decode"):
            raise InvalidInput("convert.to", to, "prefill or decode")
        self.kernel.call(lambda: self._convert(to))

    def close(self) -> None:
        """Ends the thread; what is outstanding fails. Idempotent."""
        self.kernel.close()

    # --- the kernel's thread -------------------------------------------------------------------------------------------------

    def _convert(self, to: str) -> None:
        if self._decode is None:
            raise InvalidInput("convert.to", to, "nothing: this cluster has no decode engine")
        source: PrefillPool | DecodePool = self._decode if to == "prefill" else self._prefill
        target: PrefillPool | DecodePool = self._prefill if to == "prefill" else self._decode
        able = [i for i in source.instances if not i.draining]
        least = 2 if to == "prefill" else 1
        if len(able) < least:
            raise InvalidInput("convert.to", to, f"{least} or more instances of the other role that take work; there are {len(able)}")
        instance = min(able, key=lambda i: i.free_at if isinstance(i, PrefillInstance) else i.running)

        def changed(_: object) -> None:
            target.add()

        def drained(_: PrefillInstance | DecodeInstance) -> None:
            instance.drained = None
            source.instances.remove(instance)  # type: ignore[arg-type]  # it came from there
            self.kernel.at(self.kernel.now + self._convert_s, changed)

        instance.draining, instance.drained = True, drained
        source.refresh()
        if not (instance.jobs if isinstance(instance, PrefillInstance) else instance.running):
            drained(instance)

    def _done(self, task: DecodeTask) -> None:
        assert self.decode_engine is not None  # it has submitted the task
        self.decode_engine.done(task)

    def _ended(self, error: EngineFailed) -> None:
        self.prefill_engine.fail_all(error)
        if self.decode_engine is not None:
            self.decode_engine.fail_all(error)
