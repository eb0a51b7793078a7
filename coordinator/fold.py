# SPDX-License-Identifier: Apache-2.0
"""From trained tensors to a bundle that only predicts: one graph, its weights, nothing to train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.bundles import recipe_of, sign_bundle
from protocol.tensors import NOTHING, ParamSpec, Tensors
from tuning.compiler import GRAPHS
from tuning.export import export_prediction

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from coordinator.job import Job
    from edge_runtime.bundle import Bundle


def fold_tensors(
    job: Job,
    bundle: Bundle,
    tensors: Tensors,
    out: Path,
    key: Ed25519PrivateKey,
    *,
    offset: Tensors = NOTHING,
    element: int | None = None,
    name: str = "",
) -> Path:
    """Fold tensors trained in a bundle into its backbone, as a signed bundle in `out`; its folder.

    `element` takes one of the elements that a method chooses from, for every image: the backbone's
    own graph, at the cost of the choice. `name` is what the manifest says in the place of the job,
    64 hex digits; "": the job itself.

    Raises: MethodError, BackboneError: as `tuning.export.export_prediction`.
    """
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(job, len(bundle.manifest.class_names))
    export_prediction(recipe, tensors, bundle.folder, out, offset=offset, element=element)
    nothing = ParamSpec(())
    manifest = dataclasses.replace(
        bundle.manifest,
        job=name or bundle.manifest.job,
        trainable=nothing,
        state=nothing,
        pairs=(),
        personal=(),
        graphs={"predict": GRAPHS["predict"]},
        files={},
    )
    sign_bundle(manifest, key, out)
    return out
