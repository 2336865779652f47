"""`python -m hmlab` is the `hmlab` command."""

from hmlab.cli import app

app(prog_name="hmlab")
