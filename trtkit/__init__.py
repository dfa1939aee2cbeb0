"""trtkit: from a Fast-Math checkpoint to majority-voted answers under a time budget.

``import trtkit`` is light: no torch, no configuration, no device is touched. See ``docs/design.md`` for the layers.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
