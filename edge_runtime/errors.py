# SPDX-License-Identifier: Apache-2.0
"""What can be wrong on a device.

EdgeError (ValueError)
├── BundleError                a bundle that is refused, before anything of it is loaded
│   ├── BundleMissingError     no such folder, or a file of it is not there
│   ├── BundlePathError        a link, a stray file, a name that leaves the folder
│   ├── BundleSignatureError   not signed, or not by the key that is trusted
│   ├── BundleContentError     a file differs from what was signed
│   └── BundleFormatError      signed, but not a bundle that this release can run
├── DataError                  the device's own data: names, types, shapes, ranges
├── AdapterError               trained tensors that are not of this bundle
├── PredictionError            a graph that a bundle lacks, or logits that are no numbers
└── TrainingError              a step that cannot run, or that gave NaN or infinity
"""

from __future__ import annotations


class EdgeError(ValueError):
    """Root of this package's errors."""


class BundleError(EdgeError):
    """A bundle that is refused."""


class BundleMissingError(BundleError):
    """No such folder, or a file of it is not there."""


class BundlePathError(BundleError):
    """Something in the folder is not a plain file, or not one that the manifest lists."""


class BundleSignatureError(BundleError):
    """Not signed, or not by the key that is trusted."""


class BundleContentError(BundleError):
    """A file differs from what was signed."""


class BundleFormatError(BundleError):
    """Signed, but not a bundle that this release can run."""


class DataError(EdgeError):
    """The device's own data do not fit the model."""


class AdapterError(EdgeError):
    """Trained tensors that are not of this bundle: its backbone, its method, its shapes."""


class PredictionError(EdgeError):
    """A bundle cannot predict as it was asked to, or gave NaN or infinity."""


class TrainingError(EdgeError):
    """A step that cannot run, or that gave NaN or infinity."""
