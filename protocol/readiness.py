# SPDX-License-Identifier: Apache-2.0
"""What a coordinator asks before it picks a round's clients, and what a client says of itself.

    coordinator                         device
    survey      job, split port      →  fetches the job's bundle where it has none yet
                                     ←  readiness   ready or why not, samples, memory, clock

Nothing of it is trusted beyond who is asked next: a client that exaggerates is found out by its
update, which says how many samples it is of. An empty answer is that of a client which has nothing
to say and may be asked, as simulated ones are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from protocol import _checks, _json
from protocol.container import require_canonical
from protocol.errors import MalformedError, TooLongError, VersionError
from protocol.limits import MAX_REASON_LENGTH, MAX_SAMPLES, MAX_UNIX_TIME
from protocol.rejection import displayable

READINESS_VERSION: Final = 1
MAX_READINESS_BYTES: Final = 16 * 1024  # honest ones are about 200 bytes

_MAX_PORT: Final = 65_535
_MAX_MEMORY_MB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Whether a client could take part in a job now."""

    job: str  # SHA-256 of the job, 64 hex digits; its bundle has that name
    split_port: int = 0  # of the coordinator, where the job's split server listens; 0: none

    def __post_init__(self) -> None:
        _checks.hexadecimal("job", self.job, 64, 64, MalformedError)
        _checks.integer("split_port", self.split_port, 0, _MAX_PORT, MalformedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """A client's answer. What it does not know is None."""

    ready: bool = True
    reason: str = ""  # why not; made displayable
    samples: int | None = None  # to train on
    held_out: int | None = None  # samples to test on
    free_memory_mb: int | None = None  # MiB
    clock: float | None = None  # seconds since 1970, by the client's clock
    working: bool | None = None  # on a plan, just now

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.boolean("ready", self.ready, error)
        if not isinstance(self.reason, str):
            raise MalformedError(f"reason: expected text, found {_checks.shown(self.reason)}")
        object.__setattr__(self, "reason", displayable(self.reason, MAX_REASON_LENGTH))
        for name, most in (
            ("samples", MAX_SAMPLES),
            ("held_out", MAX_SAMPLES),
            ("free_memory_mb", _MAX_MEMORY_MB),
        ):
            if (value := getattr(self, name)) is not None:
                _checks.integer(name, value, 0, most, error)
        if self.clock is not None:
            clock = _checks.real("clock", self.clock, error, low=0.0)
            if clock > MAX_UNIX_TIME:
                raise MalformedError(f"clock: expected at most {MAX_UNIX_TIME}, found {clock:g}")
            object.__setattr__(self, "clock", clock)
        if self.working is not None:
            _checks.boolean("working", self.working, error)


def pack_survey(survey: Survey) -> bytes:
    """The bytes that travel."""
    return _json.canonical(_survey_fields(survey))


def unpack_survey(raw: bytes) -> Survey:
    """Raises: MalformedError, TooLongError, VersionError."""
    found = Survey(**_parsed(raw, "job", "split_port"))
    require_canonical(_survey_fields(found), raw)
    return found


def pack_readiness(readiness: Readiness) -> bytes:
    """The bytes that travel."""
    return _json.canonical(_readiness_fields(readiness))


def unpack_readiness(raw: bytes) -> Readiness:
    """Raises: MalformedError, TooLongError, VersionError."""
    if not raw:
        return Readiness()
    names = ("ready", "reason", "samples", "held_out", "free_memory_mb", "clock", "working")
    found = Readiness(**_parsed(raw, *names))
    require_canonical(_readiness_fields(found), raw)
    return found


def _survey_fields(survey: Survey) -> dict[str, Any]:
    return {"version": READINESS_VERSION, "job": survey.job, "split_port": survey.split_port}


def _readiness_fields(readiness: Readiness) -> dict[str, Any]:
    return {
        "version": READINESS_VERSION,
        "ready": readiness.ready,
        "reason": readiness.reason,
        "samples": readiness.samples,
        "held_out": readiness.held_out,
        "free_memory_mb": readiness.free_memory_mb,
        "clock": readiness.clock,
        "working": readiness.working,
    }


def _parsed(raw: bytes, *names: str) -> dict[str, Any]:
    if len(raw) > MAX_READINESS_BYTES:
        raise TooLongError(
            f"message: expected at most {MAX_READINESS_BYTES} bytes, found {len(raw)}"
        )
    try:
        value = _json.parse(raw)
    except ValueError as error:
        raise MalformedError(f"message: {error}") from None
    version = _checks.mapping("message", value, MalformedError).get("version")
    if version != READINESS_VERSION or isinstance(version, bool):
        raise VersionError(
            f"message: expected version {READINESS_VERSION}, found {_checks.shown(version)}; both "
            "sides need releases that share a version"
        )
    fields = _checks.keys("message", value, ("version", *names), MalformedError)
    return {name: each for name, each in fields.items() if name != "version"}
