"""The ServerApp: one study from start to end over whatever Grid Flower hands it."""

from __future__ import annotations

from collections.abc import Callable

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def build_server_app(work: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main is ``work``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid, context)

    return app
