"""A workbench for hierarchical memories in language models."""

__version__ = "0.1.0"
