# SPDX-License-Identifier: Apache-2.0
"""The page on updates: `python -m fedloom.update_reference > docs/updates.md`.

What codecs and mergers say of themselves is read from the classes, sizes are those of the encoder.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

_HEAD = """# How updates travel, and how they are merged

What a client sends is the change that training made, encoded by a *codec*; what the server makes of
all changes is up to a *merger*, and how far it moves the tensors is up to the server optimizer.
All three are named in the job file:

```toml
[update]
codec = "ternary:0.05,mean"          # up
error_feedback = true
downlink = "changes"                 # down: what changed, not the tensors
downlink_codec = "ternary:0.05,mean"

[aggregation]
merger = "centred-clipping"
factors = "up"                       # LoRA: train B only
server_optimizer = "yogi"
server_learning_rate = 0.01
```

Settings stand after a colon, in the order shown below or by name (`ternary:0.1,scale=mean`).

This page is made from the code by `python -m fedloom.update_reference`; a test holds them together.

## Choosing a codec

- **Nothing to save**: `float32`, or `float16` for half of it at no loss that a run would show.
- **A quarter to an eighth, no state on the client**: `int8` and `int4`. Rounding is random and
  right on average, so that errors of many clients cancel. `:channel` costs four bytes a row and
  helps where rows differ in size.
- **A thirtieth or less**: `one-bit` or `ternary`, with `error_feedback = true`: a client keeps what
  its codec left behind and adds it to its next update. Without it what is small never arrives. The
  scale `mean` (of the survivors) suits error feedback; `std` is ComPEFT's, made for one transfer.
- **Under a mask** (secure sums): `grid`, whose integers can be added before anyone reads them, at
  8 bits about as good as `int8`; `votes` with `error_feedback = true` at one bit or two. Both clip
  an update to a norm that you choose: somewhat above what updates have. A share of the values,
  `grid:8,1.0,0.1`, is the same random one for every client.
- **Down as well**: `downlink = "changes"` encodes the difference to what a client holds. Clients
  that missed a round are sent the tensors whole, in float32; where few clients take part in a round
  that is most of them, and `downlink = "tensors"` with `float16` is the better choice.

`fedloom compare` of `examples/updates-*.toml` shows accuracy over bytes:

![Accuracy over bytes of five jobs that differ in codec and merger](updates.png)

### Codecs

| codec | bytes for 10,000 values in a [100, 100] tensor | of float32 | source |
| --- | --- | --- | --- |
"""

_MERGERS = """
## Choosing a merger

- **Honest clients, any method**: `weighted-mean`. Of LoRA factors it averages A and B apart, which
  is not the mean of the models: `ffa-lora` and `rolora` are exact and send half of it, `flexlora`
  is exact as far as its rank goes, `flora` and `fedex-lora` are exact and send more down.
- **Clients that may lie**: `centred-clipping` or `geometric-median` with `factors = "up"` and
  `weighting = "uniform"`. Rules see A and B side by side: what is robust in the factors need not be
  in their product, unless one of them stands still. `fedloom bench aggregation` plays six attacks.
  A backdoor is held back and not closed: with a fifth of ten clients who train on a trigger and
  send twice what they learned, for three rounds, 0.71 of the images that bear it are taken for the
  liars' class under `centred-clipping`, all of them under the mean, and 0.04 where nobody lies
  (`tests/attacks/test_lying_clients.py`: digits, the head of a tiny frozen network).
- **Clients whose data may be wrong, where only sums are seen**: `masked-geometric-median` with
  `privacy.secure_aggregation = true` ([what it is worth](secure-aggregation.md#a-robust-rule)). It
  is not sum-only: what is summed are terms that clients make, around a centre that they are sent.
- **Labels so uneven that averaging stalls**: few `training.local_steps` and a server optimizer
  (`adam`, `yogi`), or `training.proximal` (FedProx).
- **Tasks rather than shards of one task**: `ties`, `dare`, `breadcrumbs`, `lines`, `opcm`. On
  clients of one task sign elections only drop what a minority has found.

*sum-only*: weighted sums are all it needs, so that it can run under secure aggregation. *exact*:
the result is the weighted mean of the clients' models up to rounding. Bytes a layer [d, k] at rank
r, in values: *all* is r(d + k).

| merger | exact | sum-only | any order, same bits | mixed ranks | up | down | source |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

_MORE = """
*all + moved*: `flora` and `fedex-lora` are exact because what factors cannot hold goes into the
frozen weights. Each round clients are sent how those have moved: at most Σ r_i(d + k) values a
layer for who took part in the round before, d·k for everybody else. They need a server that adds
the merged update as it is. A run's `adapter/` then holds `base_offset.safetensors` beside the
adapter, which is of the moved backbone.

- **Devices of several sizes**: `ranks = "4,8,16"` gives each client one of these ranks, by its name
  and for good, with any merger that mixes ranks. `flexlora` cuts the result to the method's rank
  and a note of the report says what that lost; `flora` and `fedex-lora` lose nothing.
- **A core between frozen factors** (LoRA-SB): `method.name = "lora-sb"`, whose cores of r² values
  the `weighted-mean` merges exactly.
- **`greedy-soup`** chooses by an accuracy: `data.validation` sets a share of the test samples
  apart for it, which is then not tested on.
- **Clients whose gradients differ** (SCAFFOLD): `training.scaffold = true` with sgd and uniform
  weights. Clients keep a control variate of every tensor; traffic doubles.
- **Robust rules on both factors** judge A and B side by side, and a note of the report says so.

## Server optimizers

| name | source |
| --- | --- |
"""

_EXAMPLES = (
    "float32", "float16", "bfloat16", "int8", "int8:channel", "int4", "one-bit", "ternary:0.1",
    "ternary:0.05,mean", "top-k:0.05", "random-k:0.05", "low-rank:4", "seed-scalars:64",
    "grid:8,1.0", "votes:1.0", "votes:1.0,ternary",
)  # fmt: skip
_TRAFFIC = {"all": "all", "up": "rd", "down": "rk", "down-only": "rk"}


def update_reference() -> str:
    """The page, in Markdown."""
    from aggregation.mergers import roles_of
    from aggregation.selection import (
        MERGERS,
        SERVER_OPTIMIZERS,
        described_merger,
        moves_base,
        term_smoothing,
    )

    lines = [_HEAD + "\n".join(_codec_rows()), _MERGERS.rstrip("\n")]
    for name, kind in MERGERS.items():
        merger: Any = described_merger(name)
        roles = roles_of(merger)
        words = [
            f"`{name}`",
            *(_yes(getattr(merger, key)) for key in ("exact", "sum_only", "order_independent")),
            _yes(getattr(merger, "mixed_ranks", False)),
            "rd and rk in turn" if name == "rolora" else _TRAFFIC[roles.shares],
            _TRAFFIC[roles.sends]
            + (" + moved" if moves_base(merger) else "")
            + (" + centre" if term_smoothing(merger) else ""),
            _source(kind),
        ]
        lines.append(f"| {' | '.join(words)} |")
    lines.append(_MORE.rstrip("\n"))
    lines += [f"| `{name}` | {_source(kind)} |" for name, kind in SERVER_OPTIMIZERS.items()]
    return "\n".join(lines) + "\n"


def _codec_rows() -> list[str]:
    import numpy as np

    from aggregation.codecs import codec_named

    values = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    rows = []
    for name in _EXAMPLES:
        codec = codec_named(name)
        size = len(codec.encode({"update": values}))
        rows.append(
            f"| `{name}` | {size:,} | 1/{values.nbytes / size:.1f} | {_source(type(codec))} |"
        )
    return rows


def _source(kind: type) -> str:
    """The first arXiv number that the class's module cites; shared ones are cited where shared."""
    module = inspect.getmodule(kind)
    found = re.search(r"arXiv (\d{4}\.\d{4,5})", (module.__doc__ or "") if module else "")
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    print(update_reference(), end="")
