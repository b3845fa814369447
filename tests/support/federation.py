"""A coordinator's link and sites' nodes in one process, over real TLS on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from certified import Consortium
from flwr.app import ConfigRecord, Context, Message, RecordDict

from medfl.client.fleet import FleetSettings
from medfl.client.node import App, Gate, Node, NodeSettings, Phase
from medfl.client.notice import Notice
from medfl.client.transport import TransportSettings
from medfl.server.connections import Patience
from medfl.server.fleet_tls import TlsFiles
from medfl.server.guard import Limits
from medfl.server.link import Link, LinkSettings
from medfl.shared.certificates import SiteFiles
from medfl.shared.errors import Code


def until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    """Wait for ``condition``; fail the test when it does not come true even on a very busy machine."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def echo(message: Message, context: Context) -> Message:
    """Reply with what came."""
    return Message(message.content, reply_to=message)


def let_in(notice: object) -> None:
    """A gate that refuses nothing."""


def question(node_id: int, text: str = "hello", ttl: float | None = None) -> Message:
    """A query for one node."""
    return Message(RecordDict({"config": ConfigRecord({"text": text})}), node_id, "query", ttl=ttl)


def text_of(message: Message) -> str:
    """What :func:`question` put in."""
    return str(message.content["config"]["text"])


@dataclass
class RunningNode:
    node: Node
    thread: threading.Thread
    news: list[tuple[Phase, str]] = field(default_factory=list)

    @property
    def phase(self) -> Phase | None:
        """Of its last news; ``None`` before the first, which may come after the coordinator has let it in."""
        return self.news[-1][0] if self.news else None

    def stop(self) -> None:
        self.node.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


@dataclass
class Lab:
    """Makes links and nodes of one consortium, and stops what a test leaves running."""

    folder: Path
    consortium: Consortium
    stack: ExitStack
    nodes: list[Node] = field(default_factory=list)

    def link_settings(
        self, *, port: int = 0, limits: Limits | None = None, patience: Patience | None = None
    ) -> LinkSettings:
        c = self.consortium
        return LinkSettings(
            "127.0.0.1",
            port,
            TlsFiles(c.authority, c.certificate, c.key),
            self.folder / "server",
            limits=limits or Limits(),
            patience=patience or Patience(),
        )

    def link(
        self, *, port: int = 0, limits: Limits | None = None, patience: Patience | None = None, sites: int = 3
    ) -> Link:
        link = self.stack.enter_context(Link(self.link_settings(port=port, limits=limits, patience=patience)))
        link.enrol(self.roster(sites))
        return link

    def roster(self, sites: int = 3) -> dict[str, str]:
        names = list(self.consortium.sites)[:sites]
        return {name: self.consortium.sites[name].node_public_key.read_text() for name in names}

    def node_settings(self, site: str, port: int, **changes: object) -> NodeSettings:
        files = self.consortium.sites[site]
        return NodeSettings(fleet_settings(files, port, **changes), self.folder / site)

    def node(
        self,
        site: str,
        port: int,
        app: App = echo,
        gate: Gate = let_in,
        settings: NodeSettings | None = None,
        on_own_word: Callable[[Notice, Code, str], None] = lambda notice, code, reason: None,
    ) -> RunningNode:
        news: list[tuple[Phase, str]] = []
        settings = settings or self.node_settings(site, port)
        node = Node(
            settings, app, gate, on_change=lambda phase, text: news.append((phase, text)), on_own_word=on_own_word
        )
        thread = threading.Thread(target=node.run, name=site, daemon=True)
        running = RunningNode(node, thread, news)
        thread.start()
        self.nodes.append(node)
        self.stack.callback(running.stop)
        return running

    def stop_nodes(self) -> None:
        """All at once: each may take a second to notice."""
        for node in self.nodes:
            node.stop()

    @contextmanager
    def federation(self, app: App = echo, sites: int = 3) -> Iterator[tuple[Link, dict[str, int]]]:
        """A link with ``sites`` nodes online."""
        link = self.link(sites=sites)
        ids = dict(link.enrol(self.roster(sites)))
        for site in ids:
            self.node(site, link.port, app)
        until(lambda: link.online() == set(ids.values()))
        yield link, ids


def fleet_settings(files: SiteFiles, port: int, **changes: object) -> FleetSettings:
    transport = TransportSettings(f"127.0.0.1:{port}", files.authority, files.certificate, files.key, timeout_s=30.0)
    return FleetSettings(transport, files.node_key, **changes)  # type: ignore[arg-type]
