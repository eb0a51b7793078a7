# SPDX-License-Identifier: Apache-2.0
"""The operator's side: job files, the round loop and its journal, admission of updates.

A job (`job.py`) says what is trained; `rounds.py` plays it round by round over any link to
clients, the one over Flower being `flower_link.py`; `admission.py` stands between what a client
sent and what is merged; `journal.py` makes a run survive a crash. A deployment is a folder
(`deployment.py`) and processes that `supervisor.py` keeps running (`up.py`): Flower's SuperLink
(`superlink.py`) on loopback, `gateway/`, the one port that devices reach, and `jobs/`, which plays
what is submitted. Nothing here imports `client_sdk`: the two sides share `protocol`, `aggregation`
and `edge_runtime`.
"""
