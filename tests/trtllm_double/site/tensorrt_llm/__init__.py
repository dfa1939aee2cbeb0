"""A strict double of TensorRT-LLM 1.0 to 1.2, for tests: the parts of its public Python interface that trtkit calls.

It knows the names and keyword arguments that all of these releases share, and raises on any other. What it builds is
not an engine: it keeps the rank files, and its executor lets the torch runtime compute the tokens.
"""

import os

__version__ = os.environ["TRTLLM_DOUBLE_VERSION"]
