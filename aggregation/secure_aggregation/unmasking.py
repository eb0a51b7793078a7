# SPDX-License-Identifier: Apache-2.0
"""The last step of a secure sum: secrets from shares, masks from secrets, the sum from under them.

With survivors U and the dropped D (who shared their secrets, and sent no vector), modulo 2ᵏ

    Σ_{u∈U} x_u = Σ_{u∈U} y_u - Σ_{u∈U} PRG(b_u) - Σ_{u∈U, v∈D∩N(u)} ±PRG(s_uv),  + where v > u

*Source* Bonawitz et al., CCS 2017. *Differs from source*: mask keys that are put together are
checked against the public key that was advertised, seeds against the commitment; if shares of a
secret do not open it, others of its holders are tried, which gets by without one false holder
where there is one to spare.

*Cost* at most n + |D|·k masks, and as many reconstructions as there are clients, with the
coefficients of a set of holders worked out once; two vectors beside the running sum.
"""

from __future__ import annotations

import numpy as np

from aggregation.packing import word_type
from aggregation.secure_aggregation import keys, shamir
from aggregation.secure_aggregation.masks import add_mask, reduce, subtract_mask
from aggregation.secure_aggregation.outcomes import Aborted, Reason
from aggregation.secure_aggregation.server_state import SecureSum, ServerState, too_few_holders


def opened(state: ServerState) -> SecureSum | Aborted:
    """The running sum without its masks, or why they stay."""
    context, attempt, names = state.context, state.attempt, state.context.names
    secrets, false = _secrets(state)
    if false is not None:
        return false
    kind = word_type(context.task.bits)
    total = np.zeros(context.task.values, kind) if state.total is None else state.total.copy()
    alive = set(state.survivors)
    for owner, secret in secrets.items():
        if owner in alive:
            seed_key = keys.self_mask_key(secret, attempt=attempt, name=names[owner])
            subtract_mask(total, seed_key)
            continue
        agreement = keys.agreements(secret)
        for peer in state.edges[owner]:
            if peer in alive:
                agreed = agreement(state.advertised[peer].mask_key)
                key = keys.pair_mask_key(
                    agreed, attempt=attempt, one=names[owner], other=names[peer]
                )
                # the lower place has added it
                (subtract_mask if peer < owner else add_mask)(total, key)
    reduce(total, context.task.bits)
    return SecureSum(values=total, members=tuple(names[place] for place in state.survivors))


def _secrets(state: ServerState) -> tuple[dict[int, bytes], Aborted | None]:
    """Seeds of survivors and mask keys of the lost, by place, each checked."""
    alive, threshold = set(state.survivors), state.context.threshold
    shares: dict[int, dict[int, int]] = {owner: {} for owner in sorted(state.holders)}
    for holder, reveal in sorted(state.reveals.items()):
        if holder not in state.dropped:
            for owner, share in (*reveal.seeds, *reveal.mask_keys):
                shares[owner][holder] = share
    if lonely := [owner for owner, found in shares.items() if len(found) < threshold]:
        return {}, too_few_holders(state, lonely, "gave shares")
    weights: dict[tuple[int, ...], tuple[int, ...]] = {}
    secrets: dict[int, bytes] = {}
    for owner, found in shares.items():
        secret = None
        holders = list(found)
        # each turn leaves out others; without any to spare there is one way only
        for turn in range(len(holders) if len(holders) > threshold else 1):
            used = tuple((holders[turn:] + holders[:turn])[:threshold])
            if used not in weights:
                weights[used] = shamir.coefficients([holder + 1 for holder in used])
            number = shamir.combine(weights[used], [found[holder] for holder in used])
            secret = _checked(state, owner, number, alive=owner in alive)
            if secret is not None:
                break
        if secret is None:
            name = state.context.names[owner]
            return {}, Aborted(
                reason=Reason.FALSE_SHARES,
                detail=f"the shares of {name} do not give what it committed to",
                names=(name,),
            )
        secrets[owner] = secret
    return secrets, None


def _checked(state: ServerState, owner: int, number: int, *, alive: bool) -> bytes | None:
    """The secret, if it is the one that its owner has committed to."""
    if number >> (8 * shamir.SECRET_BYTES):
        return None
    secret = number.to_bytes(shamir.SECRET_BYTES, "little")
    if not alive:
        return secret if keys.public_of(secret) == state.advertised[owner].mask_key else None
    name = state.context.names[owner]
    expected = keys.commitment(secret, attempt=state.attempt, name=name)
    return secret if expected == state.commitments[owner] else None
