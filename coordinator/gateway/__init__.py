# SPDX-License-Identifier: Apache-2.0
"""The one public port of a deployment, and the only way from a device to the coordinator.

Behind TLS it forwards `/v1/fleet/...` to Flower's SuperLink on loopback, hands enrolments to the
authority and gives out the files of bundles; everything else does not exist. `server.py` holds the
connections and closes those that do not get on, `app.py` knows the paths, `identity.py` says which
device speaks. Health and metrics are on a second port, of loopback only.
"""
