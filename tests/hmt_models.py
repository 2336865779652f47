"""Tiny random backbones for HMT, with weights large enough that everything read matters."""

import torch
import transformers

from hmlab import model as models
from hmlab.memories import lmn
from hmlab.wrappers.hmt import HMT

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}  # fmt: skip
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
TRANSFORMERS = {
    "llama": GATED,
    "qwen2": GATED,
    "gpt_neox": {"intermediate_size": 48},
    "mistral": GATED | {"sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},  # projection and width differ
}
RECURRENT = {
    "mamba": {"state_size": 4, "conv_kernel": 3},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "expand": 2},
}
ATTENDING = ["llama", "qwen2", "gpt_neox", "opt", "lmn"]
ALL = [*ATTENDING, *RECURRENT]
SMALL = {"segment_length": 8, "sensory": 3, "cache_size": 4, "recall_dim": 16}


def backbone(family, **fields):
    """A model in evaluation mode."""
    torch.manual_seed(7)
    if family == "lmn":
        memory = lmn.Config(dim=32, heads=2, banks=1)
        model = models.Config(vocab=VOCAB, dim=32, layers=2, memory=memory).build()
    else:
        sizes = SIZES | TRANSFORMERS.get(family, {}) | RECURRENT.get(family, {}) | fields
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "A_log" not in name:
                weight.normal_(std=0.2)
    return model.eval()


def wrapped(family="llama", *, sharp=True, **fields):
    """HMT round it, in evaluation mode. sharp: the recall chooses, instead of taking all memories alike."""
    hmt = HMT(backbone(family), HMT.Config(**SMALL | fields)).eval()
    if sharp and hmt.config.query != "none":
        with torch.no_grad():
            hmt.recall.query.weight.normal_(std=0.5)
            hmt.recall.key.weight.normal_(std=0.5)
    return hmt


def text(*shape, seed=0):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
