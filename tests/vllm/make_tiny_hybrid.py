"""Writes a tiny Gemma 3 with sliding-window and full-attention layers and random weights, the same on every run.

usage: make_tiny_hybrid.py FOLDER
"""

import sys

import tiny_tokenizer
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

# Not a multiple of any block size: the window's first block is then partly outside it.
WINDOW = 100


def main(folder: str) -> None:
    """Six layers, every third of them with full attention."""
    tiny_tokenizer.save(folder)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        sliding_window=WINDOW,
        query_pre_attn_scalar=64,
        initializer_range=0.5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        # The embedding is also the output head: small in the residual stream, lest the model repeat its last token.
        model.model.embed_tokens.weight.mul_(0.02)
        # Sharp attention: averaged over hundreds of random tokens, every step would look the same.
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(5.0)
            layer.self_attn.k_norm.weight.fill_(1.0)
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
