"""What only a GPU host can show of the TensorRT-LLM backend, as small experiments on the practice checkpoint.

The authors had no GPU with TensorRT-LLM: nothing here was run against the real package. That is what it is for. Each
item builds what it needs (engines of a few megabytes) in a scratch directory.
"""
