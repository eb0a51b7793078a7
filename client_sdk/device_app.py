# SPDX-License-Identifier: Apache-2.0
"""The process that a device's SuperNode starts for each message.

    python -m client_sdk.device_app     with the arguments of `flwr-clientapp`

It stands in the place of Flower's own (see `client_sdk.pinned_app`), and answers from the folder
that the environment names.
"""

from __future__ import annotations

import os
from pathlib import Path

from client_sdk.client_app import Client, NodeConfig, make_client_app
from client_sdk.home import FOLDER_VARIABLE, PATH_VARIABLE, Home
from client_sdk.pinned_app import run_pinned


def open_device(node: NodeConfig) -> Client:
    """The device of this process's environment. Raises: IdentityError, SettingsError."""
    from client_sdk.participant import Participant

    device = Participant(Home(Path(os.environ[FOLDER_VARIABLE])))
    return Client(name=device.name, answer=device.answer, survey=device.survey, sum=device.sum)


def main() -> None:
    """Answers one message, and ends."""
    # A SuperNode finds one command by its PATH and no other; the owner's own code wants the rest.
    os.environ["PATH"] = os.environ.pop(PATH_VARIABLE, os.defpath)
    run_pinned(lambda: make_client_app(open_device))


if __name__ == "__main__":
    main()
