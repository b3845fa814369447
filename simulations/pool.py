"""Many virtual sites in several processes: the same grid, whose sites answer side by side.

Each site belongs to one worker for good, so that what it remembers is in one place. A worker is a fork: it shares the
images with its parent and copies none. Results have the same bits with any number of workers, because a site's
training depends on nothing but the study, the site and the round, and updates are summed in fixed point.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch
from flwr.app import Context, Message

from medfl.client.records import MemoryRecords
from medfl.shared.errors import MedFLError
from medfl.simulations.grid import VirtualGrid

_GRACE_S = 10.0


class PooledGrid(VirtualGrid):
    """``with PooledGrid(app, records, workers=4) as grid``: sites are dealt to the workers in turn.

    A worker has one message at a time, and the next as soon as its reply is here: no pipe ever holds two models.
    """

    def __init__(
        self, app: Callable[[Message, Context], Message], records: Mapping[str, MemoryRecords], *, workers: int
    ) -> None:
        super().__init__(app, records)
        self._records = records
        self._replies: dict[str, Message] = {}  # that have come and were not asked for yet
        self._at_work: dict[int, str] = {}  # worker -> the message it has
        self._workers: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        context = multiprocessing.get_context("fork")
        for number in range(min(workers, len(records))):
            here, there = context.Pipe()
            process = context.Process(
                target=self._serve, args=(there, [*self._workers, here]), name=f"site-worker-{number}", daemon=True
            )
            process.start()
            there.close()
            self._workers.append(here)
            self._processes.append(process)

    def __enter__(self) -> PooledGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._workers:
            connection.close()  # a worker that waits ends
        for process in self._processes:
            process.join(_GRACE_S if kind is None else 0)
            if process.is_alive():
                process.kill()
                process.join()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the addressed sites work, and return the replies that come first; none where nobody was asked.

        Raises:
            MedFLError: a worker died.
        """
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        self._hand_out(wanted)
        while not (here := [identity for identity in wanted if identity in self._replies]):
            if not any(identity in wanted for identity in self._at_work.values()):
                return []
            self._take_in()
            self._hand_out(wanted)
        return [self._replies.pop(identity) for identity in here]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, in order of arrival."""
        left, replies = set(self.push_messages(messages)), []
        while left and (come := list(self.pull_messages(left))):
            left -= {reply.metadata.reply_to_message_id for reply in come}
            replies += come
        return replies

    def bring_home(self) -> None:
        """Copy what each site has recorded for itself from its worker into ``records``.

        Raises:
            MedFLError: a worker died.
        """
        while self._at_work:
            self._take_in()
        for worker, connection in enumerate(self._workers):
            connection.send(None)
            for name, kept in self._receive(worker).items():
                self._records[name].take_over(kept)

    def _worker_of(self, message: Message) -> int:
        return message.metadata.dst_node_id % len(self._workers)

    def _hand_out(self, wanted: Set[str]) -> None:
        """Give each idle worker the oldest wanted message to one of its sites."""
        if len(self._at_work) == len(self._workers):
            return
        for identity, message in list(self._waiting.items()):
            worker = self._worker_of(message)
            if identity in wanted and worker not in self._at_work:
                self._workers[worker].send(self._waiting.pop(identity))
                self._at_work[worker] = identity
                if len(self._at_work) == len(self._workers):
                    return

    def _take_in(self) -> None:
        """Wait for a reply, and take all that are there."""
        waiting = {self._workers[worker]: worker for worker in self._at_work}
        for connection in wait(list(waiting)):
            worker = waiting[connection]  # type: ignore[index]
            self._replies[self._at_work[worker]] = self._receive(worker)
            del self._at_work[worker]

    def _receive(self, worker: int) -> Any:
        try:
            return self._workers[worker].recv()
        except (EOFError, ConnectionError):
            self._processes[worker].join(_GRACE_S)
            raise MedFLError(
                f"a worker process of the simulation ended (status {self._processes[worker].exitcode}; -9 is often "
                "memory that ran out): set workers lower"
            ) from None

    def _serve(self, connection: Connection, not_mine: Sequence[Connection]) -> None:
        """A worker's life: one message after the other, at last what its sites have recorded."""
        for other in not_mine:
            other.close()  # the fork copied them: while one is open, its worker does not see that the parent has gone
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then lets its workers end
        torch.set_num_threads(1)
        names: set[str] = set()
        while True:
            try:
                message = connection.recv()
            except EOFError:
                return
            if message is None:
                connection.send({name: self._records[name] for name in names})
                continue
            node = message.metadata.dst_node_id
            names.add(self._names[node])
            connection.send(self._app(message, self._context(node)))
