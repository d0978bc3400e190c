"""Write the tiny language models of this folder, and what transformers computes with them, in float32.

    pip install torch transformers tokenizers && python tests/language_models/make.py

They are committed, so that tests need neither: each directory is as `save_pretrained` leaves it, beside `expected.npz`
with tokens `ids [b s]`, `logits`, for every site the activations of all blocks, `[layers b s n]`; and what `generate`
appends to the first `PROMPT` tokens, `greedy [b n]`, and the logit of each, `greedy_logits [b n]`.
"""

from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
PROMPT, NEW = 6, 64
SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZES = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
FOUR = SMALL | LLAMA | {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = FOUR | {"head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 5}
NEOX = SMALL | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_positions=96, n_embd=24, n_layer=3, n_head=4)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=True)),
    "llama3": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, **LLAMA, head_dim=8, rope_parameters=LLAMA3, tie_word_embeddings=False)
    ),
    "llama_biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**FOUR, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**FOUR, head_dim=6, sliding_window=5)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**FOUR, tie_word_embeddings=True)),
    "qwen2_windows": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**FOUR, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**FOUR, head_dim=10)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NEOX)),
    "gpt_neox_serial": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5)
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**FOUR)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**FOUR, sliding_window=6)),
    "phi3_partial": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**FOUR, partial_rotary_factor=0.5)),
}


def first(x):
    """The first of several outputs, or the only one."""
    return x[0] if isinstance(x, tuple) else x


def watch(block, found: dict[str, list]) -> None:
    """Keep what a block computes at each site."""

    def after(site, module):
        module.register_forward_hook(lambda module, args, out: found.setdefault(site, []).append(first(out)))

    def before(site, module):
        module.register_forward_pre_hook(lambda module, args: found.setdefault(site, []).append(args[0]))

    parts = dict(block.named_modules())
    attention = next(part for name, part in parts.items() if name in ("attn", "attention", "self_attn"))
    output = next(part for name, part in attention.named_children() if name in ("o_proj", "dense", "c_proj"))
    # What is added to the residual, behind a norm if there is one. In a block with a norm before the MLP too, a
    # "post-attention" norm is behind attention; in llama's, whose names are older, it is the one before the MLP.
    behind = "post_feedforward_layernorm" in parts
    block.register_forward_pre_hook(
        lambda module, args, kwargs: found.setdefault("resid_pre", []).append(
            args[0] if args else kwargs["hidden_states"]
        ),
        with_kwargs=True,
    )
    before("hook_z", output)
    after("attn_out", parts["post_attention_layernorm"] if behind else output)
    before("mlp_in", parts["mlp"])
    after("mlp_out", parts["post_feedforward_layernorm"] if behind else parts["mlp"])
    after("resid_post", block)


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
        model.set_attn_implementation("eager")
        for parameter in model.parameters():  # norms and biases too, which start at 1 and 0
            torch.nn.init.normal_(parameter, std=0.3)
        large = model.config.vocab_size > 256
        ids = torch.randint(0, 257, (2, 20)) if large else torch.randint(0, 61, (2, 11))
        found: dict[str, list] = {}
        base = model.base_model
        for block in base.h if name == "gpt2" else base.layers:  # `hidden_states` would have the last behind the norm
            watch(block, found)
        with torch.no_grad():
            logits = model(ids).logits.numpy()
        # The second in shards, with their index.
        model.save_pretrained(HERE / name, max_shard_size="20KB" if name == "llama" else "5GB")
        if large:
            tokenizer.save(str(HERE / name / "tokenizer.json"))
        sites = {site: np.stack(each) for site, each in found.items()}
        model.generation_config.eos_token_id = None  # so that it does not stop there
        how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
        with torch.no_grad():
            greedy = model.generate(ids[:, :PROMPT], attention_mask=torch.ones(2, PROMPT), **how)
        tokens = {"ids": ids, "greedy": greedy.sequences[:, PROMPT:]}
        tokens = {key: each.numpy().astype(np.int32) for key, each in tokens.items()}
        largest = torch.stack(greedy.logits, dim=1).amax(dim=-1).numpy()
        arrays = tokens | {"greedy_logits": largest, "logits": logits} | sites
        np.savez_compressed(HERE / name / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
