"""Runs on a Dask cluster: a :class:`minihyperflows.lab.workers.Pool` like the local processes."""

from __future__ import annotations

import importlib
import logging
import queue
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from minihyperflows.errors import UserError
from minihyperflows.lab.workers import (
    SECONDS_TO_WAIT,
    Event,
    Kind,
    Work,
    carry_out,
    describe,
    new_token,
    news_of,
)

SECONDS_TO_CONNECT = 10


class Cluster:
    """A :class:`Pool` that hands everything to the Dask scheduler at ``address``.

    The workers need this package and see the same folders under the same names.
    """

    def __init__(self, address: str) -> None:
        distributed = _distributed()
        self.address = address
        for name in ("distributed", "distributed.client"):  # one line is enough, and it is ours
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._client = distributed.Client(
                address, timeout=SECONDS_TO_CONNECT, set_as_default=False
            )
        except (OSError, ValueError, ImportError) as error:  # a time-out is an OSError
            raise UserError(f"no Dask scheduler answers at {address}: {error}") from error
        self._topic = f"minihyperflows-{new_token()}"
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[str, tuple[Any, Work]] = {}
        self._client.subscribe_topic(self._topic, lambda event: self._news.put(event[1]))

    def __str__(self) -> str:
        workers = self._client.nthreads()  # the threads of each, as it is now
        return f"{sum(workers.values())} threads of {len(workers)} workers of {self.address}"

    def has_room(self) -> bool:
        return True  # the scheduler keeps what has to wait

    def start(self, attempt: Work) -> None:
        arguments = (attempt, self._topic)
        future = self._client.submit(_carry_out_on_cluster, *arguments, key=attempt.token)
        self._running[attempt.token] = future, attempt
        future.add_done_callback(lambda future: self._news.put(future.key))

    def wait(self) -> Sequence[Event]:
        try:
            news = self._news.get(timeout=SECONDS_TO_WAIT)
        except queue.Empty:
            news = None
        if self._client.status not in ("running", "connecting"):
            raise self._gone()
        token, report = (news, None) if isinstance(news, str) else news or (None, None)
        if token not in self._running:
            return []
        if report is not None:
            return [news_of(self._running[token][1], report)]
        future, attempt = self._running.pop(token)
        if future.status in ("cancelled", "lost"):
            raise self._gone()
        return [Event(attempt, *_result(future))]

    def _gone(self) -> UserError:
        return UserError(
            f"the Dask scheduler at {self.address} is gone; the same command continues"
        )

    def close(self) -> None:
        with suppress(Exception):  # the scheduler may be gone, and there is nothing else to do
            self._client.cancel([future for future, _ in self._running.values()])
        for _, attempt in self._running.values():
            attempt.withdraw()  # what runs on a worker cannot be stopped from here
        self._client.close()


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise UserError(
            '--dask needs Dask: pip install "minihyperflows[sweep]", here and on the workers'
        ) from error


def _carry_out_on_cluster(attempt: Work, topic: str) -> tuple[Kind, str]:
    """What a Dask worker does."""
    worker = _distributed().get_worker()
    return carry_out(attempt, lambda report: worker.log_event(topic, (attempt.token, report)))


def _result(future: Any) -> tuple[Kind, str]:
    """What came of an attempt on the cluster."""
    try:
        return future.result()
    except _distributed().KilledWorker:
        return Kind.DIED, "the cluster lost it"
    except Exception as error:
        return Kind.FAILED, describe(error)
