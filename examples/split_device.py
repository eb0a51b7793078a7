# SPDX-License-Identifier: Apache-2.0
"""A device of a split network, in a process of its own; `split_over_loopback.py` starts some.

    python examples/split_device.py FOLDER CLIENT HOST:PORT

FOLDER holds the job's `bundle`, the device's own `CLIENT.npz`, and its key and certificates. Plans
come in on standard input and updates go out on standard output, as a length and so many bytes: a
deployment has Flower there. Hidden states go to the server over gRPC, under TLS both ways.
"""

from __future__ import annotations

import struct
import sys
from functools import partial
from pathlib import Path

import grpc
import numpy as np

from client_sdk.split import SplitAddress, connect, respond_split
from edge_runtime import open_bundle, preprocess
from edge_runtime.split_trainer import SplitTrainer
from edge_runtime.trainer import EVALUATION_ROWS
from protocol.manifest import Manifest

LENGTH = struct.Struct("<Q")


def data_of(folder: Path, client: str, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """What to train on, and what to test on, ready for the network."""
    raw = dict(np.load(folder / f"{client}.npz"))
    parts = [
        {name.removeprefix(part): array for name, array in raw.items() if name.startswith(part)}
        for part in ("fit/", "held_out/")
    ]
    return [preprocess(manifest.preprocessing, part) for part in parts]


def main(folder: Path, client: str, address: str) -> int:
    """Answers plans until there are no more."""
    bundle = open_bundle(folder / "bundle", public_key=None)
    manifest = bundle.manifest
    assert manifest.split is not None, "expected the bundle of a split network"
    root, key, certificate = (
        (folder / name).read_bytes() for name in ("root.pem", f"{client}.key", f"{client}.pem")
    )
    where = SplitAddress(
        address=address,
        credentials=grpc.ssl_channel_credentials(root, key, certificate),
        server_name="server",
    )
    rows = max(manifest.training.batch_size, EVALUATION_ROWS)
    answer = partial(
        respond_split,
        bundle_manifest=manifest,
        initial=bundle.initial(),
        trainer=SplitTrainer(bundle, threads=1),
        connect=partial(connect, where=where, spec=manifest.split, most_rows=rows),
        client=client,
    )
    fit, held_out = data_of(folder, client, manifest)
    while header := sys.stdin.buffer.read(LENGTH.size):
        plan = sys.stdin.buffer.read(*LENGTH.unpack(header))
        update = answer(plan, data_fit=fit, data_held_out=held_out)
        assert "torch" not in sys.modules, "a device has no training framework"
        sys.stdout.buffer.write(LENGTH.pack(len(update)) + update)
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python split_device.py FOLDER CLIENT HOST:PORT")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
