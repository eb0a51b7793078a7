# SPDX-License-Identifier: Apache-2.0
"""Who may take part: the authority that signs certificates, tokens, the registry of devices, and
the log of what was decided.

`service.py` is what a server calls: request bytes in, answer bytes out, whatever carries them. A
token, the device's entry and the line in the log are one transaction of one SQLite file
(`store.py`), so that a crash leaves all of them or none.
"""
