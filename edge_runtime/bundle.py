# SPDX-License-Identifier: Apache-2.0
"""A compiled, signed job on disk, opened only if every byte is what was signed.

A bundle is a folder of data, never code: `manifest.json`, its signature `manifest.sig`, the
signer's public key `signer.pub`, and the files that the manifest lists: graphs, weights,
`initial.safetensors`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from edge_runtime.errors import (
    BundleContentError,
    BundleError,
    BundleFormatError,
    BundleMissingError,
    BundlePathError,
    BundleSignatureError,
)
from protocol.errors import ManifestError, SignatureError
from protocol.files import (
    ENVELOPE,
    INITIAL_FILE,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    SIGNER_NAME,
    hash_file,
    list_files,
    read_small,
)
from protocol.limits import MAX_MANIFEST_BYTES, MAX_SIGNER_BYTES
from protocol.manifest import Manifest
from protocol.signing import SIGNATURE_BYTES, verify


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified folder. Whoever may write to the folder afterwards can still change it."""

    folder: Path
    manifest: Manifest
    public_key: str  # hex; whose signature was found good

    def path(self, role: str) -> Path:
        """The graph of a role ("train", "evaluate", "predict")."""
        if role not in self.manifest.graphs:
            known = ", ".join(sorted(self.manifest.graphs))
            raise BundleFormatError(f"graph: expected one of {known}, asked for {role!r}")
        return self.folder / self.manifest.graphs[role]

    def initial(self) -> dict[str, np.ndarray]:
        """The trainable tensors that the first round starts from. Raises: BundleError."""
        path = self.folder / INITIAL_FILE
        entry = self.manifest.files[INITIAL_FILE]
        try:
            raw = read_small(path, entry.size)
        except ManifestError as error:
            raise BundleContentError(f"bundle {self.folder}: {error}; fetch it again") from None
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise BundleContentError(
                f"bundle {self.folder}: {INITIAL_FILE} was changed after it was opened; "
                "fetch it again"
            )
        try:
            tensors: dict[str, np.ndarray] = load_safetensors(raw)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BundleFormatError(f"{INITIAL_FILE}: expected safetensors: {error}") from None
        if problem := self.manifest.trainable.mismatch(tensors):
            raise BundleFormatError(f"{INITIAL_FILE}: {problem}; build the bundle again")
        return tensors


def open_bundle(folder: Path | str, *, public_key: str | None) -> Bundle:
    """The bundle in `folder`, after checking all of it.

    With `public_key` (64 hex digits) the signer must be that one; with None any signer is
    accepted, which shows that the bundle is whole but not who made it. Order: bounded sizes, then
    the signature over the manifest's bytes, then the manifest itself, then the listing of the
    folder, then size and SHA-256 of every file. Raises: BundleError.
    *Cost* one pass over all bytes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleMissingError(f"bundle {folder}: no such folder; build or fetch it first")
    try:
        raw, signer = _verified_manifest(folder, public_key)
        manifest = Manifest.from_json(raw)
    except ManifestError as error:
        raise BundleFormatError(f"bundle {folder}: {error}; build it again") from None
    _require_runnable(folder, manifest)
    _require_listed_files(folder, manifest)
    for name, entry in manifest.files.items():
        path = folder / name
        # the size first: a wrong one need not be hashed
        size = os.lstat(path).st_size
        if size != entry.size:
            raise BundleContentError(
                f"bundle {folder}: {name}: expected {entry.size} bytes, found {size}; "
                "fetch it again"
            )
        try:
            found = hash_file(path)
        except ManifestError as error:
            raise BundlePathError(f"bundle {folder}: {error}") from None
        if found != entry:
            raise BundleContentError(
                f"bundle {folder}: {name}: expected SHA-256 {entry.sha256}, found {found.sha256}; "
                "it was changed after signing, fetch it again"
            )
    return Bundle(folder, manifest, signer)


def _verified_manifest(folder: Path, public_key: str | None) -> tuple[bytes, str]:
    """The manifest's bytes and the hex key whose signature on them was found good."""
    raw = _read(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    signature = _read(folder, SIGNATURE_NAME, SIGNATURE_BYTES)
    signer_text = _read(folder, SIGNER_NAME, MAX_SIGNER_BYTES)
    try:
        signer = signer_text.removesuffix(b"\n").decode("ascii")
        if public_key is not None and signer != public_key.strip().lower():
            raise BundleSignatureError(
                f"bundle {folder}: expected the signer {public_key}, found {signer!r}; "
                "it is from another coordinator than the one trusted here"
            )
        verify(raw, signature, signer)
    except UnicodeDecodeError:
        raise BundleSignatureError(
            f"bundle {folder}: {SIGNER_NAME}: expected 64 hex digits"
        ) from None
    except SignatureError as error:
        raise BundleSignatureError(f"bundle {folder}: {error}") from None
    return raw, signer


def _read(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    if not os.path.lexists(path):
        raise BundleMissingError(f"bundle {folder}: {name} is missing; build or fetch it again")
    try:
        return read_small(path, limit)
    except ManifestError as error:
        raise BundlePathError(f"bundle {folder}: {error}") from None


def _require_runnable(folder: Path, manifest: Manifest) -> None:
    if INITIAL_FILE not in manifest.files:
        raise BundleFormatError(f"bundle {folder}: the manifest does not list {INITIAL_FILE}")
    for role, name in manifest.graphs.items():
        if name not in manifest.files:
            raise BundleFormatError(
                f"bundle {folder}: the manifest does not list {name} (graph {role})"
            )


def _require_listed_files(folder: Path, manifest: Manifest) -> None:
    """Exactly the manifest's files are there: a stray one could shadow or be loaded unsigned."""
    try:
        found = set(list_files(folder))
    except ManifestError as error:
        raise BundlePathError(f"bundle {folder}: {error}") from None
    except OSError as error:
        raise BundleError(f"bundle {folder}: cannot be listed: {error.strerror}") from None
    expected = {*manifest.files, *ENVELOPE}
    for name in sorted(expected - found):
        raise BundleMissingError(f"bundle {folder}: {name} is missing; fetch it again")
    for name in sorted(found - expected):
        raise BundlePathError(
            f"bundle {folder}: {name} is not in the signed manifest; remove it, or fetch again"
        )
