# SPDX-License-Identifier: Apache-2.0
"""What people look at when a run is over: a self-contained page, drawn as inline SVG from the files
that a run leaves behind, whether it was simulated or played on a deployment."""
