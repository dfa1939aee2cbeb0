"""Not part of TensorRT-LLM: opens what the double's builder kept with trtkit's torch runtime, on the CPU."""

import json
import shutil

import torch

from drafter.config import TreeShape
from trtkit.checkpoint.trtllm_reader import merged_drafter, open_trtllm
from trtkit.runtime.load import compute_dtype
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits


def open_engine_dir(model_path, scratch, rows):
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    pretrained, build = config["pretrained_config"], config["build_config"]
    (scratch / "config.json").write_text(json.dumps(pretrained), encoding="utf-8")
    for rank in range(pretrained["mapping"]["world_size"]):
        shutil.copyfile(model_path / f"rank{rank}.engine", scratch / f"rank{rank}.safetensors")
    checkpoint = open_trtllm(scratch)
    device = torch.device("cpu")
    dtype = compute_dtype(checkpoint.spec, device)
    model = DecoderModel(checkpoint, device=device, dtype=dtype, max_tokens=build["max_seq_len"] + 1)
    drafting = None
    if build["max_draft_len"]:
        tree = TreeShape(beams=pretrained["redrafter_num_beams"], length=pretrained["redrafter_draft_len_per_beam"])
        drafting = Drafting(head=merged_drafter(scratch, dtype=dtype, device=device), trees=(tree,))
    rows = rows or build["max_batch_size"]
    limits = TorchLimits(
        rows=rows, total_tokens=build["max_seq_len"] - build["max_draft_len"],
        kv_blocks=rows * (build["max_seq_len"] // 16 + 3), kv_dtype=checkpoint.scheme.kv_dtype,
    )  # fmt: skip
    return config, TorchEngine(model, limits, drafting)
