# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a device, from its folder alone: nobody is asked, nothing is changed."""

from __future__ import annotations

import time
from typing import Any

from client_sdk.bundle_cache import BundleCache
from client_sdk.conditions import look
from client_sdk.data import open_source
from client_sdk.errors import ClientError, DataError
from client_sdk.home import Home
from client_sdk.identity import Membership
from client_sdk.outbox import Outbox
from client_sdk.participant import prepared
from client_sdk.settings import Settings
from client_sdk.updates import sample_count
from edge_runtime.errors import EdgeError


def status_of(home: Home, held: Membership) -> dict[str, Any]:
    """Numbers, texts, lists and mappings, as JSON has them; times in seconds since 1970.

    The device's data are read, all of them: against the bundle of the job that the device was asked
    for last, if it is here. Raises: SettingsError, IdentityError.
    """
    settings, last = home.settings(), home.last()
    told: dict[str, Any] = {
        "device": held.device,
        "coordinator": held.coordinator,
        "url": str(home.coordinator()),
        "signer": held.signing_key,
        "fingerprint": held.fingerprint,
        "certificate_until": held.not_after,
        "certificate_valid": held.not_before <= time.time() < held.not_after,
        "running": home.runner(),
        "last_survey": last.get("survey"),
        "last_work": last.get("work"),
        "bundles": [
            {"job": one.job, "bytes": one.size} for one in BundleCache(home.bundles).held()
        ],
        "outbox": _outbox(home),
        "conditions": None,
        "data": None,
    }
    if settings is not None:
        verdict = look(settings.conditions)
        told["conditions"] = {
            "ready": verdict.ready,
            "reasons": list(verdict.reasons),
            "unknown": list(verdict.unknown),
        }
        asked = last.get("survey") or last.get("work") or {}
        told["data"] = _data(home, held, settings, str(asked.get("job", "")))
    return told


def _outbox(home: Home) -> list[dict[str, Any]]:
    if not home.outbox.is_dir():
        return []
    return [
        {
            "job": entry.attempt.job,
            "round": entry.attempt.round,
            "bytes": entry.size,
            "finished": entry.finished,
        }
        for entry in Outbox(home.outbox).entries()
    ]


def _data(home: Home, held: Membership, settings: Settings, job: str) -> dict[str, Any]:
    """The source, how much is in it, and all that does not fit the job."""
    told: dict[str, Any] = {
        "source": settings.data,
        "samples": None,
        "held_out": None,
        "checked_for": None,
        "faults": [],
    }
    try:
        bundle = BundleCache(home.bundles).opened(job, held.signing_key) if job else None
        if bundle is None:
            own = open_source(settings.data)
            told["samples"] = sum(map(sample_count, own.fit))
            told["held_out"] = sum(map(sample_count, own.held_out))
        else:
            told["checked_for"] = job
            data = prepared(settings, bundle)
            told["samples"] = sample_count(data.fit)
            told["held_out"] = sample_count(data.held_out)
    except DataError as error:
        told["faults"] = list(error.faults)
    except (ClientError, EdgeError) as error:
        told["faults"] = [str(error)]
    return told
