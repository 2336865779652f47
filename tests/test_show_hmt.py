"""What an HMT adds: the published shares, the sizes of the real module, and one line for whatever cannot be told."""

import json

import pytest
import torch
from test_cli import hmlab, refused
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from hmlab.wrappers.hmt.sizes import added_parameters, cache_bytes, segment_tokens

OPT_350M = OPTConfig(word_embed_proj_dim=512, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24,
                     num_attention_heads=16, do_layer_norm_before=False)  # fmt: skip
LLAMA_2_7B = LlamaConfig()
NEEDED = ["--width", 8, "--backbone-parameters", 1000]


def shown(*arguments) -> dict:
    return json.loads(hmlab("show", "hmt", *arguments, "--json").stdout)


def written(path, config) -> list:
    path.write_text(json.dumps(config.to_dict()))
    return ["--transformers-config", path]


@pytest.mark.parametrize(("width", "parameters", "config", "percent"),
                         [(512, 331196416, OPT_350M, 1.27), (4096, 6738415616, LLAMA_2_7B, 0.50)])  # fmt: skip
def test_the_published_shares_from_numbers_and_from_a_configuration(width, parameters, config, percent, tmp_path):
    by_numbers = shown("--width", width, "--recall-width", 4096, "--backbone-parameters", parameters)
    assert by_numbers["added_parameters"] == 2 * 4096 * width + 2 * width + 1
    assert round(by_numbers["added_percent"], 2) == percent
    by_file = shown("--recall-width", 4096, *written(tmp_path / "config.json", config))
    counted = by_file.pop("segment_kv_bytes")
    assert by_file == by_numbers
    numbers = 2 * config.num_hidden_layers * config.hidden_size * (256 + 32 + 2)
    assert counted == {"float32": 4 * numbers, "bfloat16": 2 * numbers}


TINY = [
    LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=40),
    GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40),
    OPTConfig(word_embed_proj_dim=8, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
              vocab_size=40),
]  # fmt: skip


@pytest.mark.parametrize("config", TINY, ids=lambda config: config.model_type)
def test_what_a_configuration_says_is_what_its_model_has(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    facts = shown(*written(tmp_path / "config.json", config), "--segment-length", 10, "--sensory", 3)
    assert facts["backbone_parameters"] == model.num_parameters()
    assert facts["width"] == facts["recall_width"] == model.get_input_embeddings().weight.shape[1]
    cache = model(torch.zeros(1, 15, dtype=torch.int64), use_cache=True).past_key_values
    assert facts["segment_kv_bytes"]["float32"] == sum(la.keys.nbytes + la.values.nbytes for la in cache.layers)


@pytest.mark.parametrize("key_norm", [True, False])
@pytest.mark.parametrize("memories", [1, 3])
def test_arithmetic_counts_what_the_module_has(memories, key_norm):
    from hmlab.wrappers.hmt import HMT

    backbone = AutoModelForCausalLM.from_config(TINY[0])
    model = HMT(backbone, HMT.Config(segment_length=10, sensory=3, memories=memories, cache_size=5, recall_dim=24,
                                     key_norm=key_norm))  # fmt: skip
    added = sum(parameter.numel() for parameter in model.parameters()) - backbone.num_parameters()
    assert added == added_parameters(16, 24, memories, key_norm)


def test_bytes_of_the_cache_and_places_of_a_segment():
    facts = shown(*NEEDED, "--memories", 2, "--cache-size", 5, "--segment-length", 7, "--sensory", 0)
    assert facts["cache_bytes"] == {"float32": 5 * 2 * 8 * 4, "bfloat16": 5 * 2 * 8 * 2}
    assert facts["segment_tokens"] == 7 + 2 * 2
    assert "segment_kv_bytes" not in facts  # numbers do not say how deep the model is
    assert cache_bytes(8, 2, 5) == 320 and segment_tokens(222) == 256


def test_for_people_the_same():
    assert "4 195 329" in hmlab("show", "hmt", "--width", 512, "--recall-width", 4096, "--backbone-parameters",
                                331196416).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--width and --backbone-parameters"),
        (["--width", 8], "--backbone-parameters"),
        (["--backbone-parameters", 8], "--width"),
        (["--width", 0, "--backbone-parameters", 8], "--width: expected 1 or more, got 0"),
        (["--width", 8, "--backbone-parameters", -1], "--backbone-parameters: expected 1 or more, got -1"),
        ([*NEEDED, "--recall-width", 0], "recall_width: expected 1 or more, got 0"),
        ([*NEEDED, "--memories", 0], "memories: expected 1 or more, got 0"),
        ([*NEEDED, "--cache-size", 0], "cache_size: expected 1 or more, got 0"),
        ([*NEEDED, "--sensory", -1], "sensory: expected 0 or more, got -1"),
        ([*NEEDED, "--dim", 8], "--dim: an option of presets and memories, got hmt"),
        ([*NEEDED, "--transformers-config", "x.json"], "--width and --backbone-parameters"),
        (["--transformers-config", "nosuch.json"], "no file nosuch.json"),
    ],
)
def test_what_cannot_be_told_is_one_line(arguments, expected):
    assert expected in refused("show", "hmt", *arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "expected JSON"),
        ("[]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "vit"}', "'vit'"),
        ('{"model_type": "lama"}', "'lama'"),
        ('{"model_type": ["llama"]}', "no model_type"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
    ],
)
def test_other_files_are_refused(text, expected, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    line = refused("show", "hmt", "--transformers-config", file)
    assert expected in line and "unexpected" not in line


@pytest.mark.parametrize("option", ["--width", "--recall-width", "--backbone-parameters", "--memories", "--sensory"])
def test_a_memory_has_no_options_of_hmt(option):
    assert f"{option}: an option of hmt, got logmem" in refused("show", "logmem", option, 8)
