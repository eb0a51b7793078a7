# SPDX-License-Identifier: Apache-2.0
"""The split server of a deployment: a process that holds the body of the job that is played.

Its port is open while a split job is wanted, and shut otherwise: a body is large, and there is
nothing to say to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coordinator.deployment import Deployment
from coordinator.errors import DeploymentError, RegistryError
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.outstanding import Outstanding
from coordinator.onnx_body import OnnxBody
from coordinator.split_server import Limits, SplitServer
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.errors import EdgeError
from edge_runtime.split_trainer import EVALUATION_ROWS
from protocol.signing import public_key_hex

if TYPE_CHECKING:
    from protocol.stream import Open

_LOOK_S: Final = 0.5
_AGAIN_S: Final = 5.0

_log = logging.getLogger(__name__)


def serve_split(folder: Path, certificate: Path, key: Path) -> None:
    """Until SIGTERM or SIGINT, with the server certificate and key in these files."""
    with Deployment(folder) as deployment:
        asyncio.run(_serve(deployment, certificate, key))


async def _serve(deployment: Deployment, certificate: Path, key: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    while not stop.is_set():
        wait_s = _LOOK_S
        if (folder := split_job(deployment)) is not None:
            try:
                await _host(deployment, folder, certificate, key, stop)
            except (EdgeError, DeploymentError, OSError, sqlite3.Error) as error:
                # Said by the job as well, which finds the same; here it is tried again.
                _log.error("job %s: its body cannot be served: %s", folder.name, error)
                wait_s = _AGAIN_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait_s)


def split_job(deployment: Deployment) -> JobFolder | None:
    """The job whose body is needed: the one that is played now, if it is a split one."""
    try:
        entry = next((entry for entry in deployment.jobs.all() if entry.due), None)
    except (RegistryError, sqlite3.Error):
        _log.exception("the registry cannot be read; it is tried again")
        return None
    if entry is None:
        return None
    folder = JobFolder(deployment.jobs_folder / entry.name)
    return folder if folder.body.is_dir() else None


async def _host(
    deployment: Deployment, folder: JobFolder, certificate: Path, key: Path, stop: asyncio.Event
) -> None:
    import grpc

    bundle = open_bundle(folder.bundle, public_key=public_key_hex(deployment.signing_key))
    assert bundle.manifest.split is not None, "a folder with a body has a split bundle"
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=deployment.authority.pem.encode(),
        require_client_auth=True,
    )
    with Outstanding(folder.outstanding) as outstanding:
        server = SplitServer(
            OnnxBody(folder.body),
            bundle.manifest.split,
            lambda opened: reason_against(deployment, bundle, outstanding, opened),
            Limits(rows=max(bundle.manifest.training.batch_size, EVALUATION_ROWS)),
            address=f"0.0.0.0:{deployment.settings.split_port}",
            credentials=credentials,
            count=outstanding.count,
        )
        async with server:
            _log.info("job %s: port %d is open to devices", folder.name, server.port)
            while not stop.is_set() and split_job(deployment) == folder:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _LOOK_S)
    _log.info("job %s: its body is served no more", folder.name)


def reason_against(
    deployment: Deployment, bundle: Bundle, outstanding: Outstanding, opened: Open
) -> str:
    """Why a session is refused; "" for a member's, of a plan that is out."""
    device = deployment.enrolment.devices.by_name(opened.client)
    if device is None or device.revoked is not None:
        return "this device is no member"
    if opened.job != bundle.manifest.job:
        return f"expected job {bundle.manifest.job[:12]}, found {opened.job[:12]}"
    return outstanding.reason_against(opened)
