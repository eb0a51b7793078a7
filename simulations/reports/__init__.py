# SPDX-License-Identifier: Apache-2.0
"""What people look at when a run is over: one self-contained page for a run, one for a comparison
of several, drawn as inline SVG from the files that a run leaves behind."""
