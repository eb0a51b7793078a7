# SPDX-License-Identifier: Apache-2.0
"""Tokens: so many uses each, whoever races for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator.enrolment.store import Store
from coordinator.enrolment.tokens import HOUR_S, Token, TokenFault, Tokens, token_hash
from coordinator.errors import AuthorityError, RegistryError


def test_token_is_used_once_and_kept_as_its_hash(desk: Any) -> None:
    tokens = Tokens(desk.store, now=desk.clock)
    token = tokens.create("cam")
    found = tokens.redeem(token)
    assert isinstance(found, Token)
    assert (found.label, found.quota, found.used) == ("cam", 1, 1)
    assert found.expires - found.created == HOUR_S
    assert tokens.redeem(token) is TokenFault.USED
    assert [known.hash for known in tokens.all()] == [token_hash(token)]
    desk.store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    written = b"".join(path.read_bytes() for path in desk.folder.iterdir())
    assert token_hash(token).encode() in written and token.encode() not in written


def test_why_a_token_is_not_taken_is_known(desk: Any) -> None:
    tokens = Tokens(desk.store, now=desk.clock)
    token = tokens.create("cam", quota=2, lifetime_s=10)
    assert isinstance(tokens.redeem(token), Token)
    desk.clock += 10
    assert tokens.redeem(token) is TokenFault.EXPIRED
    assert tokens.redeem("00" * 32) is TokenFault.UNKNOWN
    assert tokens.all()[0].used == 1


def test_use_is_undone_with_the_transaction_that_it_was_a_part_of(desk: Any) -> None:
    tokens = Tokens(desk.store, now=desk.clock)
    token = tokens.create("cam")
    with pytest.raises(ZeroDivisionError), desk.store.transaction():
        tokens.redeem(token)
        _ = 1 / 0
    assert isinstance(tokens.redeem(token), Token)


@pytest.mark.parametrize("stores", [1, 4])
@pytest.mark.parametrize("quota", [1, 7])
def test_hundred_threads_use_a_token_as_often_as_its_quota_says(
    desk: Any, tmp_path: Path, stores: int, quota: int
) -> None:
    token = Tokens(desk.store, now=desk.clock).create("cam", quota=quota)
    opened = [Store(tmp_path / "registry.sqlite") for _ in range(stores)]
    found: list[object] = []
    start = threading.Barrier(100)

    def race(store: Store) -> None:
        tokens = Tokens(store, now=desk.clock)
        start.wait()
        found.append(tokens.redeem(token))

    threads = [threading.Thread(target=race, args=(opened[n % stores],)) for n in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in opened:
        store.close()
    assert sum(isinstance(result, Token) for result in found) == quota
    assert found.count(TokenFault.USED) == 100 - quota


@pytest.mark.parametrize(("settings", "words"), [
    ({"quota": 0}, "quota: expected 1 to"),
    ({"quota": 10**9}, "quota: expected 1 to"),
    ({"lifetime_s": 0}, "lifetime: expected at most"),
    ({"lifetime_s": 1e9}, "lifetime: expected at most"),
])  # fmt: skip
def test_settings_out_of_bounds_are_errors(desk: Any, settings: Any, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        Tokens(desk.store).create("cam", **settings)


def test_label_must_fit_a_name(desk: Any) -> None:
    with pytest.raises(AuthorityError, match="label: expected 1 to 40 letters"):
        Tokens(desk.store).create("../cam")
