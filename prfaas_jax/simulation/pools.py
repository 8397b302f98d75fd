"""The instances of one cluster behind one queue, and the row of the view that describes them."""

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
        self._servers, self._load, self.row = servers, servers.load, row
        self.instances: list[PrefillInstance] = []
        for _ in range(count):
            self.add()

    def add(self) -> PrefillInstance:
        """One more instance."""
        instance = PrefillInstance(self._kernel, self.instance.prefill, self._chunk, self._rows, self, len(self.instances))
        self.instances.append(instance)
        self.refresh()
        return instance

    @property
    def alive(self) -> bool:
        """Whether some instance takes prompts."""
        return any(i.up and not i.draining for i in self.instances)

    def submit(self, task: PrefillTask) -> None:
        """To the instance with least work left, the first at a tie; some instance must be alive."""
        now = self._kernel.now
        best = min((i for i in self.instances if i.up and not i.draining), key=lambda i: max(i.free_at, now))
        best.submit(task)
        self.refresh()

    def refresh(self) -> None:
        """Writes the pool's columns of the view."""
        now, load, row = self._kernel.now, self._load, self.row
        count, total, least, best = 0, 0.0, float("inf"), None
        for instance in self.instances:
            if instance.up and not instance.draining:
                count += 1
                left = instance.free_at - now
                if left <= 0.0:
                    left = 0.0
                total += left
                if left < least:
                    least, best = left, instance
        load.instances[row] = count
        if best is not None:
            load.free_at_s[row] = now + least
            load.drained_at_s[row] = now + total / count
            load.jobs[row] = best.jobs


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
        self.waiting: deque[DecodeTask] = deque()
        self.joined: Callable[[DecodeTask], None] = lambda task: None
        for _ in range(count):
            self.add()

    def add(self) -> DecodeInstance:
        """One more instance, which takes waiting requests at once."""
        instance = DecodeInstance(self._kernel, self.instance, self._finish, self, len(self.instances))
        self.instances.append(instance)
        self.pump()
        return instance

    @property
    def alive(self) -> bool:
        """Whether some instance takes requests."""
        return any(i.up and not i.draining for i in self.instances)

    def submit(self, task: DecodeTask) -> None:
        """Joins a batch, or waits behind those that wait already. InvalidInput for a request that no empty instance could hold."""
        if task.kv_bytes > self.instance.kv_memory_bytes:
            limit = f"at most {self.instance.kv_memory_bytes:.0f} bytes, the decode memory of {self.instance.name}"
            raise InvalidInput("request KV", task.kv_bytes, limit)
        self.waiting.append(task)
        self.pump()

    def pump(self) -> None:
        """Lets waiting requests join while there is room: into the batch that has fewest."""
        while self.waiting:
            task = self.waiting[0]
            room = [i for i in self.instances if i.fits(task)]
            if not room:
                break
            self.waiting.popleft()
            (room[0] if len(room) == 1 else min(room, key=lambda i: i.running)).join(task)
            self.joined(task)
        self.refresh()

    def _finish(self, task: DecodeTask) -> None:
        self._done(task)
        self.pump()

    def refresh(self) -> None:
        """Writes the pool's columns of the view."""
        free = slots = 0
        for instance in self.instances:
            if instance.up and not instance.draining:
                slots += self.instance.max_batch
                free += self.instance.max_batch - instance.running
        load, row = self._load, self.row
        load.free_slots[row], load.slots[row], load.waiting[row] = free, slots, len(self.waiting)
