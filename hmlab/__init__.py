"""hmlab: a workbench for hierarchical memory in neural networks."""

__version__ = "0.1.0"
