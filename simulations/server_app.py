# SPDX-License-Identifier: Apache-2.0
"""The ServerApp of a simulation that Flower runs: it waits for nodes and hands on their link."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from coordinator.flower_link import FlowerLink


def make_server_app(
    play: Callable[[FlowerLink], None], *, clients: int, timeout_s: float = 0.0, window: int = 0
) -> ServerApp:
    """A ServerApp that waits for `clients` nodes and hands `play` the link to them."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(FlowerLink(grid, clients=clients, timeout_s=timeout_s, window=window))

    return app
