# SPDX-License-Identifier: Apache-2.0
"""How the shipped vision backbone is made.

Banks of images are generated once (`glyphs`, `patterns`), joined with the public half of
Fashion-MNIST, and a small vision transformer learns to name them under heavy augmentation
(`augment`) with one linear head per source (`pretrain`). The heads are thrown away; `evaluate`
measures what remains by what users will do with it: LoRA, central and federated.
"""
