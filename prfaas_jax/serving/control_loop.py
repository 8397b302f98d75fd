"""Controllers on a live system: they see what is placed and how it goes, and the router carries out what they say."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from absl import logging

from prfaas_jax.scheduling.controllers import Action, Controller, Convert, UsePolicy
from prfaas_jax.scheduling.view import ClusterView, Placement, Policy, Request
from prfaas_jax.serving.live_view import LiveView
from prfaas_jax.serving.proto import generation_pb2


class ControlLoop:
    """One controller, asked every `period_s` wall seconds. On the router's event loop.

    Attributes:
        policy: what decides now.
        conversions: instances that were told to change their role.
    """

    _SAID = 32

    def __init__(
        self,
        policy: Policy,
        controller: Controller | None,
        live: LiveView,
        period_s: float,
        convert: Callable[[Convert], Awaitable[bool]],
    ):
        """`convert` tells an instance to change its role, and says whether one was told."""
        self.policy = policy
        self._said: list[str] = []
        self.conversions = 0
        self._controller, self._live, self._period_s, self._convert = controller, live, period_s, convert
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to ask the controller, if there is one."""
        if self._controller is not None:
            self._task = asyncio.create_task(self._run(self._controller))

    async def stop(self) -> None:
        """Ends it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """By the policy of the moment; raises NoDecodeServer."""
        return self.policy.place(request, view, now)

    def placed(self, request: Request, placement: Placement, now: float) -> None:
        """A request is on its way there, for the first time."""
        if self._controller is not None:
            self._controller.observe(request, placement, now)

    def report(self, status: generation_pb2.GenerationStatus) -> None:
        """Adds what the controller did."""
        status.conversions = self.conversions
        status.control.extend(self._said)

    async def _run(self, controller: Controller) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            now = self._live.now
            try:
                actions: Sequence[Action] = controller.update(self._live.at(now), now)
            except Exception:
                # A controller that fails must not take the router with it: the policy that it left goes on.
                logging.exception("the controller failed; policy %s goes on", type(self.policy).__name__)
                continue
            for action in actions:
                try:
                    await self._act(action)
                except Exception:
                    logging.exception("the router could not carry out %s", action)

    async def _act(self, action: Action) -> None:
        match action:
            case UsePolicy(policy, reason):
                self.policy = policy
            case Convert(region, to, reason):
                told = await self._convert(action)
                self.conversions += told
                reason = f"{region}: an instance {'is to' if told else 'should, and cannot,'} {to}: {reason}"
        logging.info("controller: %s", reason)
        self._said = [*self._said[1 - self._SAID :], reason]
