"""Engines that several test modules share: compiling them costs more than running the tests."""

import dataclasses
from collections.abc import Iterator

import pytest
from engine_harness import SMALL, make_runner

from prfaas_jax.engine.runner import Runner


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """One warm Runner on one device; each test makes its own worker over it."""
    yield make_runner()


@pytest.fixture(scope="session")
def states() -> Iterator[Runner]:
    """A warm Runner of a model that keeps states beside its pages, in four slots."""
    yield make_runner(dataclasses.replace(SMALL, checkpoint="random:gated_delta_toy", slots=5))


@pytest.fixture(scope="session")
def sender() -> Iterator[Runner]:
    """A warm Runner for prefill alone, of the same shape."""
    yield make_runner(decode=False, ingest=False)
