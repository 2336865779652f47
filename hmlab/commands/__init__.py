"""The commands, one module for each group; `hmlab.cli` puts them together.

Only light libraries are imported at the top of these modules, so that `hmlab --help` answers at once.
"""
