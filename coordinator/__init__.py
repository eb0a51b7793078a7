# SPDX-License-Identifier: Apache-2.0
"""The operator's side: job files, the round loop and its journal, admission of updates.

A job (`job.py`) says what is trained; `rounds.py` plays it round by round over any link to
clients; `admission.py` stands between what a client sent and what is merged; `journal.py` makes a
run survive a crash. Flower is imported in `server_app.py` only. A deployment is processes that
`supervisor.py` keeps running: Flower's SuperLink (`superlink.py`) on loopback, and `gateway/`, the
one port that devices reach. Nothing here imports `client_sdk`: the two sides share `protocol` and
`aggregation`.
"""
