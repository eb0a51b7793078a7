# SPDX-License-Identifier: Apache-2.0
"""From a finished run to a bundle that only predicts: one graph, its weights, nothing to train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.fold import fold_tensors
from coordinator.job import load_job
from edge_runtime.adapter import read_adapter
from edge_runtime.bundle import open_bundle
from protocol.signing import new_key
from simulations.errors import RunFolderError
from simulations.run import JOB_FILE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def fold_run(
    run: Path, out: Path, *, element: int | None = None, key: Ed25519PrivateKey | None = None
) -> Path:
    """Fold a run's final tensors into its backbone, as a signed bundle in `out`; its folder.

    `element` takes one of the elements that a method chooses from, for every image: the backbone's
    own graph, at the cost of the choice.

    Raises:
        RunFolderError: `run` is not the directory of a finished run.
        BundleError, AdapterError: its bundle or adapter was changed.
        MethodError, BackboneError: as `coordinator.fold.fold_tensors`.
    """
    for name in (JOB_FILE, "bundle", "adapter"):
        if not (run / name).exists():
            raise RunFolderError(
                f"{run}: expected the directory of a finished run, found no {name} in it"
            )
    job = load_job(run / JOB_FILE)
    bundle = open_bundle(run / "bundle", public_key=None)
    adapter = read_adapter(run / "adapter", bundle)
    return fold_tensors(
        job,
        bundle,
        adapter.tensors,
        out,
        key or new_key(),
        offset=adapter.offset,
        element=element,
    )
