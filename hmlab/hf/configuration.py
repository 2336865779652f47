"""The configuration of a language model round any memory, as transformers writes it into `config.json`.

    HmlabConfig.of(model_config)          # from a `hmlab.model.Config`
    config.language_model                 # what `hmlab.registry.to_dict` gives: the only fields that say anything

vocab_size, hidden_size, num_hidden_layers and max_position_embeddings are read from there, for whoever asks by these
names. Memories of installed packages are found by their entry points; no code comes with a folder.
Errors: `ValueError` and `hmlab.registry.UnknownName` naming the field.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hmlab import registry
from hmlab.model import Config


class HmlabConfig(PreTrainedConfig):
    """language_model: a `hmlab.model.Config` as JSON. use_cache: whether a call gives its state back if not told.
    pad_token_id, bos_token_id, eos_token_id: None unless the tokenizer was given some. kwargs: transformers' own."""

    model_type = "hmlab"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, language_model: dict[str, Any] | None = None, use_cache: bool = True,
                 tie_word_embeddings: bool = False, pad_token_id: int | None = None, bos_token_id: int | None = None,
                 eos_token_id: int | list[int] | None = None, **kwargs: Any) -> None:
        self.language_model, self.use_cache, self.tie_word_embeddings = language_model, use_cache, tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: Config, **fields: Any) -> HmlabConfig:
        """From the configuration of a language model, whose memory must be registered."""
        return cls(language_model=json.loads(json.dumps(registry.to_dict(config))), **fields)

    def model_config(self) -> Config:
        """The configuration of the language model."""
        if self.language_model is None:
            raise ValueError("language_model: expected the fields of a hmlab.model.Config, got None")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: expected False, a LanguageModel's head is its own, got True")
        return registry.from_dict(self.language_model)

    @property
    def vocab_size(self) -> int | None:
        return self._read("vocab")

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.language_model = {**(self.language_model or {}), "vocab": value}

    @property
    def hidden_size(self) -> int | None:
        return self._read("dim")

    @property
    def num_hidden_layers(self) -> int | None:
        return self._read("layers")

    @property
    def max_position_embeddings(self) -> int | None:
        """Of learned positions; None where a document may be of any length."""
        return self._read("context") or None

    def _read(self, name: str) -> Any:
        return None if self.language_model is None else self.language_model.get(name)
