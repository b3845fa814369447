"""One node as a process of its own: ``python site_process.py CONSORTIUM SITE PORT STATE``. Replies with a count."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from federation import fleet_settings, let_in, text_of
from flwr.app import ConfigRecord, Context, Message, RecordDict

from medfl.client.node import Node, NodeSettings
from medfl.shared.certificates import SiteFiles


def app(message: Message, context: Context) -> Message:
    """Count messages in ``context.state``; wait where the message says so; return arrays as they came."""
    if "arrays" in message.content:
        return Message(message.content, reply_to=message)
    seen = int(str(context.state.config_records.get("seen", ConfigRecord({"times": 0}))["times"])) + 1
    context.state["seen"] = ConfigRecord({"times": seen})
    if text_of(message) == "wait":
        (Path(sys.argv[4]) / "waits").touch()
        time.sleep(600)
    content = {"text": str(seen), "process": os.getpid(), "node": str(context.node_id)}
    return Message(RecordDict({"config": ConfigRecord(content)}), reply_to=message)


def main() -> None:
    """Run until SIGTERM."""
    folder, site, port, state = sys.argv[1:]
    files = SiteFiles(Path(folder) / "sites" / site)
    node = Node(NodeSettings(fleet_settings(files, int(port)), Path(state)), app, let_in)
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()


if __name__ == "__main__":
    main()
