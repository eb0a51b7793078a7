# SPDX-License-Identifier: Apache-2.0
"""Pre-trained transformers that a job may tune: the shipped small ViT, MiniLM, or any local folder.

Every backbone, the shipped one included, is a Hugging Face folder and is loaded by one function,
`load_backbone`. `families.py` says where the parts of each supported architecture are.
"""

from tuning.backbones.backbone import (
    Backbone,
    backbone_folder,
    backbone_kind,
    load_backbone,
    named_backbones,
)

__all__ = ["Backbone", "backbone_folder", "backbone_kind", "load_backbone", "named_backbones"]
