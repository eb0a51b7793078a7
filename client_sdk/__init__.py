# SPDX-License-Identifier: Apache-2.0
"""A device's side of the federation.

`data/` reads what the device trains on, and checks it against a bundle. `updates.py` turns a plan
into an update, with whatever trains; `outbox.py` keeps updates until the coordinator is done with
them, `memory.py` what the device keeps for itself; `client_app.py` answers plans inside of Flower.
`conditions.py` says whether the device takes work now. Nothing here imports `coordinator` or torch.
"""
