# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a transformer are, by the `model_type` of its configuration.

Methods that go through peft, and those that treat every layer alike (head, full, SSF), need only
the classifier's name. Adapters and prompts must find the blocks, and say so of a family that is
not listed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Module paths of one architecture, as `transformers` names them.

    Paths below a block are relative to it. `ffn_input` is the module whose *input* is the residual
    stream that enters the feed-forward part: the norm before it in a pre-norm network, the first
    linear layer in a post-norm one. Whatever is added to the output of `ffn_output` is added to
    the residual stream. `readout` takes what the last block leaves.
    """

    model_type: str
    embeddings: str
    blocks: str
    readout: str
    query: str
    value: str
    ffn_input: str
    ffn_output: str


VIT = Family(
    model_type="vit",
    embeddings="vit.embeddings",
    blocks="vit.layers",
    readout="vit.layernorm",
    query="attention.q_proj",
    value="attention.v_proj",
    ffn_input="layernorm_after",
    ffn_output="mlp.fc2",
)

BERT = Family(
    model_type="bert",
    embeddings="bert.embeddings",
    blocks="bert.encoder.layer",
    readout="bert.pooler",
    query="attention.self.query",
    value="attention.self.value",
    ffn_input="intermediate.dense",
    ffn_output="output.dense",
)

LLAMA = Family(
    model_type="llama",
    embeddings="model.embed_tokens",
    blocks="model.layers",
    readout="model.norm",
    query="self_attn.q_proj",
    value="self_attn.v_proj",
    ffn_input="post_attention_layernorm",
    ffn_output="mlp.down_proj",
)

# Later decoders that keep LLaMA's module names.
QWEN2 = replace(LLAMA, model_type="qwen2")
MISTRAL = replace(LLAMA, model_type="mistral")

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (VIT, BERT, LLAMA, QWEN2, MISTRAL)
}
