# SPDX-License-Identifier: Apache-2.0
"""What a device answers, and what it needs for that: its bundles, its data, its own conditions.

What the data are like stays here: a coordinator is told that they do not fit, and the device's own
status says why.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import edge_runtime.errors
from client_sdk.bundle_cache import BundleCache
from client_sdk.conditions import look, threads_of
from client_sdk.data import ModelData, open_source, prepare
from client_sdk.errors import (
    ClientError,
    DataError,
    IdentityError,
    NotNowError,
    OutboxError,
    PlanError,
    SettingsError,
)
from client_sdk.gateway import Gateway
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.machine import Machine
from client_sdk.memory import FolderMemory
from client_sdk.outbox import Outbox, answer_once
from client_sdk.peers import trusted_peers
from client_sdk.readiness import readiness
from client_sdk.split import SplitAddress, connect, respond_split
from client_sdk.summing import FolderSums, answer_sum
from client_sdk.updates import respond, sample_count
from client_sdk.work import longest_plan
from edge_runtime.bundle import Bundle
from edge_runtime.errors import EdgeError
from edge_runtime.split_trainer import SplitTrainer
from edge_runtime.trainer import EVALUATION_ROWS, OnnxTrainer
from protocol.errors import ContainerError, ProtocolError
from protocol.files import TOKENIZER_FILE
from protocol.keys import sign
from protocol.plan import Plan, unpack_plan
from protocol.readiness import Readiness, Survey, pack_readiness, unpack_survey

if TYPE_CHECKING:
    from client_sdk.identity import Membership
    from client_sdk.settings import Settings

_KEPT_REASON: Final = 4_000  # characters in `last.json`

_STATUS: Final = "its own status tells more: fedloom device status"
_OF_DATA: Final = (DataError, edge_runtime.errors.DataError)

_log = logging.getLogger(__name__)


class Participant:
    """A device in its folder, for one message. Raises: IdentityError, SettingsError."""

    def __init__(self, home: Home, machine: Machine | None = None) -> None:
        self._home = home
        self._machine = machine or Machine()
        self._identity = Identity(home.folder)
        held, settings = self._identity.membership, home.settings()
        if held is None:
            raise IdentityError(f"{home.folder}: no member of any deployment; enrol this device")
        if settings is None:
            raise SettingsError(
                f"{home.folder}: expected where this device's data are; say so with: "
                "fedloom device run --data ..."
            )
        self._held: Membership = held
        self._settings: Settings = settings

    @property
    def name(self) -> str:
        """The device's, as the coordinator gave it."""
        return self._held.device

    def survey(self, blob: bytes) -> bytes:
        """Whether this device could take part in a job now; it fetches the job's bundle for that.

        Answers b"" to b"". Raises nothing that a device can be the reason for.
        """
        if not blob:
            return b""
        with self._noted("survey") as noted:
            try:
                asked = unpack_survey(blob)
                noted.job = asked.job
                told = self._ready(asked)
            except _OF_DATA as error:
                noted.refused = str(error)
                told = self._not_ready(_kept_here(error))
            except (ClientError, EdgeError, ProtocolError) as error:
                noted.refused = str(error)
                told = self._not_ready(noted.refused)
            except Exception as error:
                # Nobody's words for the coordinator: they may quote what stays here.
                noted.refused = f"{type(error).__name__}: {error}"
                told = self._not_ready(f"{type(error).__name__}; {_STATUS}")
        return pack_readiness(told)

    def answer(self, plan_blob: bytes) -> bytes:
        """The update, or the metrics, that a plan asks for.

        Raises: NotNowError; PlanError, TrainingError, DataError; FetchError and what else the
            coordinator may do; OutboxError; SplitError.
        """
        with self._noted("work") as noted:
            try:
                try:
                    plan, _ = unpack_plan(plan_blob, max_bytes=len(plan_blob))
                except ContainerError as error:
                    raise PlanError(f"plan: {error}") from None
                noted.job, noted.round, noted.task = plan.job, plan.round, plan.task
                self._require_conditions()
                return answer_once(plan_blob, self._outbox(), functools.partial(self._worked, plan))
            except _OF_DATA as error:
                noted.refused = str(error)
                raise DataError(_kept_here(error)) from None
            except Exception as error:
                noted.refused = f"{type(error).__name__}: {error}"
                raise

    def sum(self, blob: bytes) -> bytes:
        """The answer to a message of a secure sum.

        Raises: PlanError, SumError; OutboxError, MemoryFileError.
        """
        with self._noted("sum") as noted:
            try:
                key, authority = self._identity.key(), self._held.authority
                # Two messages at once would go on from the same state.
                with self._outbox().answering():
                    return answer_sum(
                        blob,
                        client=self.name,
                        memory=lambda job: FolderMemory(self._home.memory(job)),
                        store=FolderSums(self._home.sums),
                        sign=lambda message: sign(message, key),
                        trust=functools.partial(trusted_peers, authority=authority),
                    )
            except Exception as error:
                noted.refused = f"{type(error).__name__}: {error}"
                raise

    def _ready(self, asked: Survey) -> Readiness:
        if self._outbox().is_answering():
            raise NotNowError("it is at work on a plan")
        self._require_conditions()
        bundle = self._bundle(asked.job)
        if bundle.manifest.split is not None:
            if not asked.split_port:
                raise PlanError("survey: the job's network is split, and it names no port for that")
            self._home.set_split_port(asked.job, asked.split_port)
        data = prepared(self._settings, bundle)
        found = readiness(bundle.manifest, sample_count(data.fit), sample_count(data.held_out))
        return replace(
            found,
            free_memory_mb=self._machine.free_memory_mb().value,
            clock=time.time(),
            working=False,
        )

    def _not_ready(self, reason: str) -> Readiness:
        try:
            working = self._outbox().is_answering()
        except OutboxError:
            working = None
        free = self._machine.free_memory_mb().value
        return Readiness(
            ready=False, reason=reason, free_memory_mb=free, clock=time.time(), working=working
        )

    def _outbox(self) -> Outbox:
        return Outbox(self._home.outbox, max_bytes=self._settings.outbox_bytes)

    def _worked(self, plan: Plan, plan_blob: bytes) -> bytes:
        bundle = self._bundle(plan.job)
        if len(plan_blob) > longest_plan(bundle.manifest):
            raise PlanError(
                f"plan: expected at most {longest_plan(bundle.manifest)} bytes, found "
                f"{len(plan_blob)}"
            )
        data = prepared(self._settings, bundle)
        threads = threads_of(self._settings.conditions)
        memory = FolderMemory(self._home.memory(plan.job))
        split = bundle.manifest.split
        if split is None:
            return respond(
                plan_blob,
                bundle_manifest=bundle.manifest,
                initial=bundle.initial(),
                trainer=OnnxTrainer(bundle, threads=threads),
                data_fit=data.fit,
                data_held_out=data.held_out,
                client=self.name,
                memory=memory,
            )
        rows = max(bundle.manifest.training.batch_size, EVALUATION_ROWS)
        where = self._split_address(plan.job)
        return respond_split(
            plan_blob,
            bundle_manifest=bundle.manifest,
            initial=bundle.initial(),
            trainer=SplitTrainer(bundle, threads=threads),
            connect=lambda plan: connect(plan, where, split, most_rows=rows),
            data_fit=data.fit,
            data_held_out=data.held_out,
            client=self.name,
            memory=memory,
        )

    def _bundle(self, job: str) -> Bundle:
        cache = BundleCache(self._home.bundles, max_bytes=self._settings.bundle_bytes)
        gateway = Gateway(self._home.coordinator(), self._held.authority, self._identity.key())
        return cache.get(job, self._held.signing_key, gateway.download)

    def _split_address(self, job: str) -> SplitAddress:
        import grpc

        port = self._home.split_port(job)
        if not port:
            raise PlanError(
                f"plan: job {job[:12]} is split, and no survey has told where its server listens"
            )
        credentials = grpc.ssl_channel_credentials(
            self._held.authority.encode(),
            self._identity.key_path.read_bytes(),
            self._held.certificate.encode(),
        )
        host = self._home.coordinator().bracketed
        return SplitAddress(address=f"{host}:{port}", credentials=credentials)

    def _require_conditions(self) -> None:
        verdict = look(self._settings.conditions, self._machine)
        if not verdict.ready:
            raise NotNowError(str(verdict))

    @contextmanager
    def _noted(self, what: str) -> Iterator[_Noted]:
        """Keeps what came of it; what cannot be kept is no reason to answer nothing."""
        noted, begun = _Noted(), time.monotonic()
        try:
            yield noted
        finally:
            happened = {
                "when": int(time.time()),
                "seconds": round(time.monotonic() - begun, 3),
                "job": noted.job,
                "round": noted.round,
                "task": noted.task,
                "refused": noted.refused[:_KEPT_REASON],
            }
            try:
                self._home.note(what, happened)
            except OSError as error:
                _log.warning("%s: cannot be written (%s)", self._home.work, error)


@dataclass(slots=True)
class _Noted:
    job: str = ""
    round: int | None = None
    task: str = ""
    refused: str = ""  # why; "" where it was answered


def prepared(settings: Settings, bundle: Bundle) -> ModelData:
    """The device's data as a bundle reads them; texts by the bundle's own tokenizer where the
    device's owner names no other. Raises: DataError with all that does not fit."""
    tokenizer = Path(settings.tokenizer) if settings.tokenizer else None
    if tokenizer is None and TOKENIZER_FILE in bundle.manifest.files:
        tokenizer = bundle.folder
    return prepare(
        bundle.manifest,
        open_source(settings.data),
        held_out=settings.held_out,
        tokenizer=tokenizer,
    )


def _kept_here(error: Exception) -> str:
    faults = len(error.faults) if isinstance(error, DataError) else 1
    return (
        f"the device's data cannot be read or do not fit the bundle ({faults} "
        f"fault{'s' if faults != 1 else ''}); {_STATUS}"
    )
