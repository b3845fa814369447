"""A site's long-lived node: waits for messages, lets one installed ClientApp answer them, keeps its state on disk.

No code ever comes from the coordinator. Whatever fails, the node stays: it says what is wrong, waits, and joins again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Protocol

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context, Message, MessageType

from medfl.client.fleet import HEARTBEAT_S, Fleet, FleetSettings, Order, Run, failure, refusal
from medfl.client.notice import Notice
from medfl.client.states import SeriesStates
from medfl.client.transport import Kind, LinkTrouble, Patience
from medfl.client.trouble import in_words
from medfl.shared.errors import Code, MedFLError, NetworkError, PolicyRefusal, ProtocolError
from medfl.shared.files import write_whole
from medfl.shared.lock import only_one
from medfl.shared.memory import give_back_freed_buffers

log = logging.getLogger("medfl.node")

POLL_S = (0.05, 1.0)  # shortest and longest pause where a coordinator does not hold empty questions
REJOIN_S = 2.5  # longest pause between attempts to join
TURN_S = 300.0  # no pause and no time-out of a connection is longer
GRACE_S = 60.0  # a message that takes so much longer than its deadline hangs
GOODBYE_S = 2.0  # no longer is a heartbeat waited for at the end
REMIND_S = 60.0  # the same trouble is logged once in this time


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """How to reach the coordinator, and where to keep state."""

    fleet: FleetSettings
    state_dir: Path
    node_config: dict[str, bool | int | float | str] = field(default_factory=dict)


class Gate(Protocol):
    """The site's first word: raises PolicyRefusal when a message is not to be fetched at all."""

    def __call__(self, notice: Notice, /) -> None:
        """Return to let the message in."""


class App(Protocol):
    """A ``flwr.clientapp.ClientApp``, or anything that is called like one."""

    def __call__(self, message: Message, context: Context, /) -> Message:
        """The reply to ``message``; may change ``context.state``."""


class Phase(StrEnum):
    """What the node is doing."""

    WAITING = "waiting"  # for the coordinator; the text says why
    ONLINE = "online"
    WORKING = "working"  # the text says on what


class Node:
    """Runs ``app`` for the coordinator's messages that ``gate`` lets through, until :meth:`stop`.

    ``on_change(phase, text)`` is told what the node is doing, from the thread of :meth:`run`. ``on_own_word`` is told
    before the node answers in the app's place, which is always a code and no result; it may raise PolicyRefusal.
    ``check_in`` is called with the connection after joining and with each heartbeat, from one thread at a time.
    ``address`` says before each attempt to join where to dial, where that may change.
    ``over`` is asked after each answer: True ends the node.

    Raises on construction:
        ConfigError: a key or certificate cannot be used.
    """

    def __init__(
        self,
        settings: NodeSettings,
        app: App,
        gate: Gate,
        *,
        on_change: Callable[[Phase, str], None] = lambda phase, text: None,
        on_own_word: Callable[[Notice, Code, str], None] = lambda notice, code, reason: None,
        check_in: Callable[[Fleet], None] = lambda fleet: None,
        address: Callable[[], str] | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self._check_in = check_in
        self._address = address
        self._app = app
        self._gate = gate
        self._on_change = on_change
        self._on_own_word = on_own_word
        self._over = over
        self._fleet = Fleet(settings.fleet)
        self._stop = threading.Event()
        self._again = threading.Event()
        self._question: Future[Order | None] | None = None
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="ask")
        self._states = SeriesStates(settings.state_dir)
        self._runs: dict[int, Run] = {}
        self._expected_by = inf  # wall clock: see alive
        self._told: tuple[Phase, str] | None = None
        self._told_at = -inf

    def run(self) -> None:
        """Join and answer messages until :meth:`stop`; then finish the message in hand, leave, and return.

        Raises:
            ConfigError: another node uses the same state folder.
        """
        with only_one(self.settings.state_dir):
            patience = Patience(self._stop, limit_s=inf, first_s=0.5, longest_s=REJOIN_S)
            try:
                while not self._stop.is_set():
                    self._expected_by = time.time() + TURN_S
                    try:
                        self._session(patience)
                    except (NetworkError, ProtocolError) as trouble:
                        self._tell(Phase.WAITING, str(trouble))
                        patience.pause()
                    except OSError as error:  # the disk is full or read-only: the node's own id cannot be kept
                        self._tell(Phase.WAITING, str(in_words(error) or f"the state folder: {error.strerror}"))
                        patience.pause()
                self._leave()
            finally:
                self._asker.shutdown(wait=False)
                self._fleet.close()

    def alive(self) -> bool:
        """Whether the loop turns: what a watchdog asks, from another thread.

        A message may take until its deadline and a minute more; anything else takes minutes at most.
        """
        return time.time() < self._expected_by

    def stop(self) -> None:
        """Make :meth:`run` return: at once when idle, else when the app does."""
        self._stop.set()

    def rejoin(self) -> None:
        """Join anew after the message in hand: the coordinator then offers its study again. From any thread."""
        self._again.set()

    def _session(self, patience: Patience) -> None:
        """Join, and answer messages for as long as nothing breaks."""
        self._again.clear()
        self._follow()
        node_id = self._fleet.join(self._former_id())
        write_whole(self._id_file, str(node_id).encode())
        patience.reset()
        self._runs.clear()
        self._tell(Phase.ONLINE, f"online at {self.settings.fleet.transport.coordinator} as node {node_id}")
        self._check_in(self._fleet)
        pause_s = POLL_S[0]
        with self._heartbeat(node_id):
            while not (self._stop.is_set() or self._again.is_set()):
                asked_at = time.monotonic()
                self._expected_by = time.time() + TURN_S
                order = self._next_order(node_id)
                if order is not None:
                    pause_s = POLL_S[0]
                    self._work(order)
                    if self._over():
                        self._stop.set()
                elif time.monotonic() - asked_at < 0.5 * self.settings.fleet.wait_s:  # it was not held
                    self._stop.wait(pause_s * random.uniform(0.8, 1.2))
                    pause_s = min(pause_s * 1.5, POLL_S[1])

    def _follow(self) -> None:
        """Dial another address from now on, where the coordinator has moved."""
        transport = self.settings.fleet.transport
        if self._address is None or (now := self._address()) == transport.coordinator:
            return
        self._tell(Phase.WAITING, f"the coordinator has moved from {transport.coordinator} to {now}")
        fleet = replace(self.settings.fleet, transport=replace(transport, coordinator=now))
        before, self._fleet = self._fleet, Fleet(fleet)
        self.settings = replace(self.settings, fleet=fleet)
        before.close()

    def _next_order(self, node_id: int) -> Order | None:
        """Ask for work. A stop does not wait for the answer: the coordinator learns by our leaving what is lost."""
        answer = self._question or self._asker.submit(self._fleet.next_order, node_id)
        self._question = answer  # stays open over a rejoining: an order may come with it
        while not (answer.done() or self._stop.is_set() or self._again.is_set()):
            wait([answer], timeout=0.1)
        if not answer.done():
            return None
        self._question = None
        return answer.result()

    def _work(self, order: Order) -> None:
        """Answer one message. What cannot be answered is dropped; a broken connection ends the session."""
        kind = order.head.metadata.message_type
        patience = Patience(self._stop, limit_s=max(0.0, order.until - time.time()))
        started_at = time.monotonic()
        self._expected_by = order.until + GRACE_S
        try:
            run = self._run_of(order, patience)
            self._tell(Phase.WORKING, f"{kind} of study {run.study}")
            reply = self._answer(order, run, patience)
            work_s = time.monotonic() - started_at
            if time.time() > order.until:
                log.warning("%s took %.0f s and came after its deadline: the answer is dropped", kind, work_s)
                return
            sent = self._send(order, run, reply, patience, work_s)
            level = logging.DEBUG if kind.startswith("query") else logging.INFO  # a secure sum is a dozen of them
            log.log(level, "%s answered in %.1f s, %d bytes sent", kind, time.monotonic() - started_at, sent)
        except LinkTrouble as trouble:
            if trouble.kind is not Kind.RUN_CLOSED:
                raise
            self._runs.clear()
            log.warning("%s: the run was closed meanwhile, the answer is dropped", kind)
        finally:
            if kind == MessageType.TRAIN:
                give_back_freed_buffers()
            self._tell(Phase.ONLINE, "waiting for the next message")

    def _answer(self, order: Order, run: Run, patience: Patience) -> Message:
        """The app's reply, or in its place an error that carries a code and no text."""
        head = order.head.metadata
        notice = _notice(order, run)
        try:
            self._gate(notice)
            message = self._fleet.fetch(order, patience)
            context = Context(
                run_id=run.run_id,
                node_id=head.dst_node_id,
                node_config=dict(self.settings.node_config),
                state=self._states.load(run.series_id),
                run_config={},
                series_id=run.series_id,
            )
            reply = self._app(message, context)
            if reply.metadata.reply_to_message_id != head.message_id:
                raise ProtocolError("the ClientApp's reply does not answer the message")
            self._states.save(context)  # before the reply leaves: what it did is then on disk
        except LinkTrouble:
            raise
        except PolicyRefusal as error:
            log.warning("%s refused: %s", head.message_type, error)
            return self._own_word(order, notice, error.code, error.reason)
        except MedFLError as error:
            log.error("%s failed: %s", head.message_type, error)
            return self._own_word(order, notice, error.code)
        except Exception as error:
            if (known := in_words(error)) is not None:
                log.error("%s failed: %s", head.message_type, known)
                return self._own_word(order, notice, known.code)
            # The text of a library's error may hold a path or a header: only where it happened is logged.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: unexpected %s at\n%s", head.message_type, type(error).__name__, frames)
            return self._own_word(order, notice, Code.UNEXPECTED)
        return reply

    def _own_word(self, order: Order, notice: Notice, code: Code, reason: str = "") -> Message:
        """An error in place of the app's reply, told before it leaves."""
        try:
            self._on_own_word(notice, code, reason)
        except PolicyRefusal as error:
            log.error("%s: %s", notice.message_type, error)
            code, reason = error.code, error.reason
        return refusal(order, reason) if code is Code.REFUSED else failure(order, code)

    def _send(self, order: Order, run: Run, reply: Message, patience: Patience, work_s: float) -> int:
        try:
            return self._fleet.send(reply, patience, work_s=work_s)
        except ProtocolError as error:  # the reply itself cannot be sent: say so instead
            log.error("the answer cannot be sent: %s", error)
            return self._fleet.send(self._own_word(order, _notice(order, run), error.code), patience, work_s=work_s)

    def _run_of(self, order: Order, patience: Patience) -> Run:
        run_id = order.head.metadata.run_id
        if run_id not in self._runs:
            self._runs = {run_id: self._fleet.run_of(order, patience)}
        return self._runs[run_id]

    @contextmanager
    def _heartbeat(self, node_id: int) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_S * random.uniform(0.35, 0.5)):
                try:
                    self._fleet.beat(node_id)
                    self._check_in(self._fleet)
                except LinkTrouble as trouble:
                    log.debug("heartbeat: %s", trouble)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            if self._stop.is_set():
                thread.join(GOODBYE_S)  # or its question would be cut off, which the log would call trouble

    @property
    def _id_file(self) -> Path:
        return self.settings.state_dir / "node_id"

    def _former_id(self) -> int | None:
        """Our id when we did not leave: after a kill, a crash, or a lost connection."""
        try:
            return int(self._id_file.read_text())
        except (OSError, ValueError):
            return None

    def _leave(self) -> None:
        node_id = self._former_id()
        if node_id is not None:
            with suppress(NetworkError, OSError):
                self._fleet.leave(node_id)
                self._id_file.unlink()
        log.info("left")

    def _tell(self, phase: Phase, text: str) -> None:
        news = (phase, text) != self._told
        if phase is Phase.WAITING and (news or time.monotonic() - self._told_at > REMIND_S):
            log.warning("%s", text)
            self._told_at = time.monotonic()
        elif news:
            level = logging.DEBUG if Phase.WORKING in (phase, (self._told or (phase,))[0]) else logging.INFO
            log.log(level, "%s", text)
        if news:
            self._told = (phase, text)
            self._on_change(phase, text)


def _notice(order: Order, run: Run) -> Notice:
    head = order.head.metadata
    return Notice(head.message_type, head.group_id, run.study, run.digest, run.run_id, run.series_id)


def check(settings: NodeSettings) -> None:
    """Whether the coordinator can be reached and accepts this site, without joining.

    Raises:
        ConfigError: a key or certificate of ours cannot be used.
        NetworkError: in words, what is wrong on the way or at the coordinator.
    """
    fleet = Fleet(settings.fleet)
    try:
        fleet.check()
    finally:
        fleet.close()
