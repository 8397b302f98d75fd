"""The instances of one cluster behind one queue, and the row of the view that describes them."""

import math
from collections import deque
from collections.abc import Callable

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.view import Servers
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.prefill import PrefillInstance, PrefillTask


class PrefillPool:
    """Prefill instances of one cluster. A prompt goes to the one with least work left, which is one queue for all of them."""

    def __init__(self, kernel: Kernel, name: str, instance: Instance, count: int, chunk: int, rows: int, servers: Servers, row: int):
        assert servers.load is not None  # the simulator's view has it
        self._kernel, self.name, self.instance, self._chunk, self._rows = kernel, name, instance, chunk, rows
        self._load, self.row = servers.load, row
        self.instances: list[PrefillInstance] = []
        self._taking: list[PrefillInstance] = []  # those that take prompts, as of the last refresh
        self.alive = False  # whether there are any
        for _ in range(count):
            self.add()
        self.publish()

    def add(self) -> PrefillInstance:
        """One more instance."""
        instance = PrefillInstance(self._kernel, self.instance.prefill, self._chunk, self._rows, self, len(self.instances))
        self.instances.append(instance)
        self.refresh()
        return instance

    def submit(self, task: PrefillTask) -> None:
        """To the instance with least work left, the first at a tie; InvalidInput where none is alive."""
        now, best, least = self._kernel.now, None, math.inf
        for instance in self._taking:
            free_at = instance.free_at
            if free_at < now:
                free_at = now
            if free_at < least:
                least, best = free_at, instance
        if best is None:
            raise InvalidInput("prefill pool", self.name, "one with an instance that takes prompts")
        best.submit(task)
        self.note()

    def refresh(self) -> None:
        """Due after instances come, go, fail, recover or begin to drain."""
        self._taking = [i for i in self.instances if i.up and not i.draining]
        self.alive = bool(self._taking)
        self.note()

    def publish(self) -> None:
        """Tells the view how many instances take prompts; due when the router learns of it."""
        self._load.instances[self.row] = len(self._taking)

    def note(self) -> None:
        """Writes into the view what the instances have to do; due after every change of it."""
        now, load, row = self._kernel.now, self._load, self.row
        total, least, best = 0.0, math.inf, None
        for instance in self._taking:
            left = instance.free_at - now
            if left < least:
                least, best = left, instance
            if left > 0.0:
                total += left
        if best is not None:
            load.free_at_s[row] = now + least if least > 0.0 else now
            load.drained_at_s[row] = now + total / len(self._taking)
            load.jobs[row], load.fresh[row] = best.jobs, len(best.fresh)


class DecodePool:
    """Decode instances of a region, and the requests whose KV is there and that wait for room, first come first served."""

    def __init__(
        self,
        kernel: Kernel,
        name: str,
        instance: Instance,
        count: int,
        done: Callable[[DecodeTask], None],
        servers: Servers,
        row: int,
    ):
        assert servers.load is not None  # the simulator's view has it
        self._kernel, self.name, self.instance, self._done = kernel, name, instance, done
        self._load, self.row = servers.load, row
        self.instances: list[DecodeInstance] = []
        self._taking: list[DecodeInstance] = []  # those that take requests, as of the last refresh
        self.alive = False  # whether there are any
        self.waiting: deque[DecodeTask] = deque()
        self.joined: Callable[[DecodeTask], None] = lambda task: None
        for _ in range(count):
            self.add()
        self.publish()

    def add(self) -> DecodeInstance:
        """One more instance, which takes waiting requests at once."""
        instance = DecodeInstance(self._kernel, self.instance, self._finish, self, len(self.instances))
        self.instances.append(instance)
        self.refresh()
        return instance

    def submit(self, task: DecodeTask) -> None:
        """Joins a batch, or waits behind those that wait already. InvalidInput for a request that no empty instance could hold."""
        if task.kv_bytes > self.instance.kv_memory_bytes:
            limit = f"at most {self.instance.kv_memory_bytes:.0f} bytes, the decode memory of {self.instance.name}"
            raise InvalidInput("request KV", task.kv_bytes, limit)
        self.waiting.append(task)
        self.pump()

    def pump(self) -> None:
        """Lets waiting requests join while there is room, into the batch that has fewest; tells the view how many still wait."""
        waiting, taking = self.waiting, self._taking
        while waiting:
            task, best, fewest = waiting[0], None, self.instance.max_batch
            for instance in taking:
                if instance.running < fewest and task.kv_bytes <= instance.free_bytes:
                    best, fewest = instance, instance.running
            if best is None:
                break
            waiting.popleft()
            best.take(task)
            self.joined(task)
        self._load.waiting[self.row] = len(waiting)

    def _finish(self, task: DecodeTask) -> None:
        self._done(task)
        self.pump()

    def refresh(self) -> None:
        """Due after instances come, go, fail, recover or begin to drain."""
        self._taking = [i for i in self.instances if i.up and not i.draining]
        self.alive = bool(self._taking)
        self.pump()

    def publish(self) -> None:
        """Tells the view how many slots there are; due when the router learns of it."""
        self._load.slots[self.row] = len(self._taking) * self.instance.max_batch
