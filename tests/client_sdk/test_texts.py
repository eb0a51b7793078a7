# SPDX-License-Identifier: Apache-2.0
"""A device with texts, and nothing beside them: its job's bundle brings the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from aggregation.codecs import codec_named
from client_sdk.home import Home
from client_sdk.participant import Participant
from protocol.files import TOKENIZER_FILE, TOKENIZER_SETTINGS
from protocol.plan import Plan, pack_plan
from protocol.readiness import Survey, pack_survey, unpack_readiness
from protocol.update import unpack_update


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    words = ("red stone", "green river", "blue cloud")
    rows = [{"text": f"{words[i % 3]} lamp", "label": f"c{i % 3}"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def trained(device: Any, made: Any, job: str, nonce: str) -> tuple[int, bytes]:
    """Samples and the update, of a device that is surveyed first."""
    participant = Participant(Home(device.home.folder))
    found = unpack_readiness(participant.survey(pack_survey(Survey(job=job))))
    assert found.ready, device.home.last()["survey"]["refused"]
    plan = Plan(
        job=job, round=1, nonce=nonce, client=device.membership.device, task="fit",
        downlink_codec="float32", uplink_codec="float32", learning_rate=0.05, local_epochs=1,
        seed=9, max_update_bytes=1_000_000,
    )  # fmt: skip
    blob = pack_plan(plan, codec_named("float32").encode(made.bundle.initial()))
    header, payload = unpack_update(participant.answer(blob), max_bytes=1_000_000)
    return header.samples, bytes(payload)


def test_texts_are_trained_with_the_bundles_own_tokenizer(
    served: Any, make_bundle: Any, tmp_path: Path, texts: Path, tiny_bert: Path
) -> None:
    made = make_bundle("lora", kind="text")
    assert {TOKENIZER_FILE, TOKENIZER_SETTINGS} <= set(made.bundle.manifest.files)
    job = served.offer(made)
    device = served.enrolled(tmp_path / "device")
    device.configure(data=texts, held_out=0.0)
    samples, update = trained(device, made, job, "ab" * 16)
    assert samples == 12
    cached = Home(device.home.folder).bundles / job
    for name in (TOKENIZER_FILE, TOKENIZER_SETTINGS):
        assert (cached / name).read_bytes() == (tiny_bert / name).read_bytes()

    # The same bits as with the backbone's own folder named.
    device.configure(tokenizer=tiny_bert)
    assert trained(device, made, job, "cd" * 16) == (samples, update)
    spec = made.bundle.manifest.trainable
    delta = codec_named("float32").decode(update, spec, 1_000_000)
    assert any(np.abs(value).max() > 0 for value in delta.values())


def test_a_tokenizer_that_was_changed_is_fetched_again(
    served: Any, make_bundle: Any, tmp_path: Path, texts: Path
) -> None:
    made = make_bundle("lora", kind="text")
    job = served.offer(made)
    device = served.enrolled(tmp_path / "device")
    device.configure(data=texts, held_out=0.0)
    update = trained(device, made, job, "ab" * 16)
    file = Home(device.home.folder).bundles / job / TOKENIZER_FILE
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"red"', b'"der"'))
    assert trained(device, made, job, "cd" * 16) == update
    assert file.read_bytes() == whole
