"""``python -m tutornet_sb.cli``, as torchrun starts it."""

from tutornet_sb.cli import app

app(prog_name="tutornet")
