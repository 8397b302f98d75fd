"""What the tests of profiled clusters share: a small cache, a fast profile, engines' events with the moments of the model's clock."""

import queue

from prfaas_jax.engine import api
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance
from prfaas_jax.testing.fake_decode import next_token
from prfaas_jax.testing.profiled_cluster import ProfiledCluster

SPEC = CacheSpec(
    (
        CacheGroup(LayerCache("paged", (TensorSpec("k", 4, 8, "bfloat16"), TensorSpec("v", 4, 8, "bfloat16"))), (0, 2)),
        CacheGroup(LayerCache("window", (TensorSpec("k", 2, 8, "bfloat16"),), 100), (1, 3)),
        CacheGroup(LayerCache("state", (TensorSpec("recurrent", 4, 30, "float32"),)), (4, 5)),
    )
)
VOCAB = 32_000
CHUNK = 256
LAST = (api.PrefillDone, api.Failed, api.Finished)

# Steps of decode take longer as batches and contexts grow.
INSTANCE = Instance("test", FittedPrefill(0.1, 8.0, 2.0), FittedDecode(0.01, 0.004, 1e-6), max_batch=4)


def cluster_of(prefill: int = 2, decode: int = 2, instance: Instance = INSTANCE, **options) -> ProfiledCluster:
    """Twenty seconds of the profile in one of the wall unless told otherwise; every byte is checked."""
    options = {"chunk": CHUNK, "time_scale": 20.0, "verify": True, "vocab_size": VOCAB, **options}
    return ProfiledCluster(instance, SPEC, "model", prefill=prefill, decode=decode, **options)


def job(ticket: str, length: int, new: int = 4, **fields) -> api.Job:
    return api.Job(ticket, tuple(range(length)), api.SamplingParams(max_new_tokens=new), **fields)


def right_tokens(job: api.Job) -> list[int]:
    ids = list(job.prompt)
    for _ in range(job.sampling.max_new_tokens):
        ids.append(next_token(ids, VOCAB).token)
    return ids[len(job.prompt) :]


class Events:
    """A sink that remembers each event with the moment of the model's clock at which it came."""

    def __init__(self, cluster: ProfiledCluster, then=lambda event: None):
        """`then(event)` is called, on the engine's thread, after each event is remembered."""
        self._kernel, self._then = cluster.kernel, then
        self.seen: list[tuple[float, api.Event]] = []
        self._over: queue.Queue = queue.Queue()

    def __call__(self, event: api.Event) -> None:
        self.seen.append((self._kernel.now, event))
        self._then(event)
        if isinstance(event, api.Failed | api.Finished):
            self._over.put(event)

    def at(self, kind: type) -> list[float]:
        """When events of one kind came."""
        return [moment for moment, event in self.seen if isinstance(event, kind)]

    @property
    def tokens(self) -> list[int]:
        return [event.token for _, event in self.seen if isinstance(event, api.Token)]

    def end(self) -> api.Event:
        """Waits for the job's end."""
        return self._over.get(timeout=30)


def run_locally(cluster: ProfiledCluster, asked: api.Job) -> Events:
    """Reserves and, once admitted, has the prompt computed by the cluster itself."""
    engine = cluster.decode_engine
    assert engine is not None

    def then(event: api.Event) -> None:
        if isinstance(event, api.Admitted):
            engine.prefill_local(asked.ticket)

    events = Events(cluster, then)
    engine.reserve(asked, events)
    return events
