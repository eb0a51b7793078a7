# SPDX-License-Identifier: Apache-2.0
"""How a network is trained that a device has both ends of: part of a bundle's manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol import _checks
from protocol.activations import FORMS, encoded_bytes
from protocol.errors import ManifestError
from protocol.limits import MAX_EPOCHS, MAX_LANES, MAX_TOKENS, MAX_VALUES
from protocol.stream import MESSAGE_OVERHEAD
from protocol.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """What crosses the cut, and the phases of a round (SFPrompt, arXiv 2407.17533).

    Tokens and width are those of one sample's hidden states: `entering_tokens` go to the server
    with the prompt among them, `leaving_tokens` come back (1 where the server pools). A share
    `drop` of the samples with the highest EL2N is left out first, as labels may be wrong there;
    of the rest the share `keep` with the highest is trained on.
    """

    entering_tokens: int
    leaving_tokens: int
    width: int
    masked: bool = False  # an attention mask goes with the hidden states
    keep: float = 1.0
    drop: float = 0.0
    scoring_epochs: int = 0  # passes of a copy with the body skipped, before it scores
    local_epochs: int = 0  # passes with the body skipped, before those over the stream
    noise: float = 0.0  # added to what leaves the device, of each token's root mean square
    form: str = "float32"  # of what crosses the cut; one of `activations.FORMS`
    lanes: int = 1  # pieces of a batch that go through the body side by side

    def __post_init__(self) -> None:
        error = ManifestError
        for name, most in (
            ("entering_tokens", MAX_TOKENS),
            ("leaving_tokens", MAX_TOKENS),
            ("width", MAX_VALUES),
        ):
            _checks.integer(f"split.{name}", getattr(self, name), 1, most, error)
        _checks.boolean("split.masked", self.masked, error)
        keep = _checks.real("split.keep", self.keep, error)
        if not 0 < keep <= 1:
            raise error(f"split.keep: expected above 0 and up to 1, found {keep:g}")
        drop = _checks.real("split.drop", self.drop, error)
        if not 0 <= drop < 1:
            raise error(f"split.drop: expected 0 to below 1, found {drop:g}")
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "drop", drop)
        noise = _checks.real("split.noise", self.noise, error, low=0.0)
        object.__setattr__(self, "noise", noise)
        for name in ("scoring_epochs", "local_epochs"):
            _checks.integer(f"split.{name}", getattr(self, name), 0, MAX_EPOCHS, error)
        _checks.one_of("split.form", self.form, FORMS, error)
        _checks.integer("split.lanes", self.lanes, 1, MAX_LANES, error)

    @property
    def prunes(self) -> bool:
        """Whether samples are left out."""
        return self.keep < 1 or self.drop > 0

    @property
    def entering(self) -> TensorSpec:
        """One sample's hidden states on their way to the server."""
        return TensorSpec((self.entering_tokens, self.width), "float32")

    @property
    def leaving(self) -> TensorSpec:
        """One sample's on their way back."""
        return TensorSpec((self.leaving_tokens, self.width), "float32")

    @property
    def mask(self) -> TensorSpec:
        """One sample's attention mask, where there is one."""
        return TensorSpec((1, 1, self.entering_tokens), "float32")

    def to_json(self) -> dict[str, object]:
        """JSON-ready."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, value: object) -> SplitSpec:
        """The inverse of `to_json`. Raises: ManifestError."""
        return cls(**_checks.keys("split", value, _FIELDS, ManifestError))


_FIELDS: Final = tuple(SplitSpec.__dataclass_fields__)


def largest_message(spec: SplitSpec, rows: int) -> int:
    """Bytes of the largest message, either way, of so many samples."""
    sizes = [encoded_bytes(each, rows, spec.form) for each in (spec.entering, spec.leaving)]
    mask = rows * spec.mask.size if spec.masked else 0
    return max(sizes) + mask + MESSAGE_OVERHEAD
