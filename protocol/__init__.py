# SPDX-License-Identifier: Apache-2.0
"""What crosses the network, and nothing else: the specification of named tensors, the plan that
asks a client for work, the update that answers it, the signed manifest of a bundle, the limits that
a reader holds them to and the rejections that it gives. Every reader treats its input as hostile:
sizes are checked before memory is taken, text is strict, and one value has one spelling. No
algorithm lives here; it needs numpy and, to sign or verify, `cryptography`."""

from __future__ import annotations

from protocol.errors import (
    ChecksumError,
    ContainerError,
    MalformedError,
    ManifestError,
    NotFiniteError,
    ProtocolError,
    SignatureError,
    SpecError,
    TooLongError,
    TruncatedError,
    VersionError,
    WeightError,
)
from protocol.manifest import (
    MANIFEST_VERSION,
    FileEntry,
    Manifest,
    Preprocessing,
    TrainingSpec,
    hash_files,
)
from protocol.plan import MAX_PLAN_OVERHEAD, Plan, pack_plan, unpack_plan
from protocol.rejection import Rejection, RejectionCode
from protocol.tensors import ParamSpec, Tensors, TensorSpec
from protocol.update import MAX_UPDATE_OVERHEAD, UpdateHeader, pack_update, unpack_update

__all__ = [
    "MANIFEST_VERSION",
    "MAX_PLAN_OVERHEAD",
    "MAX_UPDATE_OVERHEAD",
    "ChecksumError",
    "ContainerError",
    "FileEntry",
    "MalformedError",
    "Manifest",
    "ManifestError",
    "NotFiniteError",
    "ParamSpec",
    "Plan",
    "Preprocessing",
    "ProtocolError",
    "Rejection",
    "RejectionCode",
    "SignatureError",
    "SpecError",
    "TensorSpec",
    "Tensors",
    "TooLongError",
    "TrainingSpec",
    "TruncatedError",
    "UpdateHeader",
    "VersionError",
    "WeightError",
    "hash_files",
    "pack_plan",
    "pack_update",
    "unpack_plan",
    "unpack_update",
]
