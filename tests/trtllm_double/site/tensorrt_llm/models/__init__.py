"""``PretrainedConfig``, and the classes of the architectures that trtkit writes, behind the strict loader."""

import json
from pathlib import Path

from tests.trtllm_double.loader import load_checkpoint


class PretrainedConfig:
    def __init__(self, values):
        self.values = values
        self.rank = 0
        self.architecture = values["architecture"]

    @classmethod
    def from_json_file(cls, config_file):
        if not isinstance(config_file, str):
            raise TypeError("config_file: a string")
        with open(config_file, encoding="utf-8") as stream:
            return cls(json.load(stream))

    def set_rank(self, rank):
        if not 0 <= rank < self.values["mapping"]["world_size"]:
            raise AssertionError(f"rank {rank} of {self.values['mapping']['world_size']}")
        self.rank = rank


class _Model:
    def __init__(self, config, rank_file):
        self.config = config
        self.rank_file = rank_file

    @classmethod
    def from_checkpoint(cls, ckpt_dir, *, config):
        if not isinstance(ckpt_dir, str) or not isinstance(config, PretrainedConfig):
            raise TypeError("from_checkpoint(ckpt_dir: str, config: PretrainedConfig)")
        load_checkpoint(Path(ckpt_dir))
        return cls(config, Path(ckpt_dir) / f"rank{config.rank}.safetensors")


MODEL_MAP = dict.fromkeys(
    ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "ReDrafterForQWenLM", "ReDrafterForLLaMALM"), _Model
)
