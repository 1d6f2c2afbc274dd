"""Writes a tiny Llama with random weights, the same on every run. usage: make_tiny_llama.py FOLDER"""

import sys

import tiny_tokenizer
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(folder: str) -> None:
    """Four layers, two KV heads."""
    tiny_tokenizer.save(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        # Large, so that greedy output varies instead of repeating one token.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
