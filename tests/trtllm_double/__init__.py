"""A strict double of the parts of TensorRT-LLM that trtkit calls."""
