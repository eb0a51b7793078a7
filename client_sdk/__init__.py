# SPDX-License-Identifier: Apache-2.0
"""A device's side of the federation.

`updates.py` turns a plan into an update, with whatever trains; `client_app.py` does so inside of
Flower. Nothing here imports `coordinator` or torch.
"""
