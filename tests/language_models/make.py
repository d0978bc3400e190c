"""Write the tiny language models of this folder, and what transformers computes with them, in float32.

    pip install torch transformers tokenizers && python tests/language_models/make.py

They are committed, so that tests need neither: each directory is as `save_pretrained` leaves it, beside `expected.npz`
with tokens `ids [b s]`, `logits` and the residual stream after every block, `hidden [layers b s d]`.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZES = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256}
LLAMA = {
    **SIZES,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=64, n_embd=24, n_layer=3, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, head_dim=8, rope_parameters=LLAMA3, tie_word_embeddings=False)
    ),
}


def main() -> None:
    """Write all of them."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = make().eval()
        for parameter in model.parameters():  # norms and biases too, which start at 1 and 0
            torch.nn.init.normal_(parameter, std=0.3)
        ids = torch.randint(0, 257, (2, 20))
        hidden = []
        blocks = model.transformer.h if name == "gpt2" else model.model.layers
        keep = partial(
            lambda hidden, block, args, out: hidden.append(out[0] if isinstance(out, tuple) else out), hidden
        )
        for block in blocks:  # `hidden_states` would have the last one behind the norm
            block.register_forward_hook(keep)
        with torch.no_grad():
            logits = model(ids).logits.numpy()
        # The second in shards, with their index.
        model.save_pretrained(HERE / name, max_shard_size="20KB" if name == "llama" else "5GB")
        tokenizer.save(str(HERE / name / "tokenizer.json"))
        np.savez(HERE / name / "expected.npz", ids=ids.numpy().astype(np.int32), logits=logits, hidden=np.stack(hidden))


if __name__ == "__main__":
    main()
