"""The commands of ``flaskbus``, one module each; :mod:`flaskbus.cli` puts them together."""

DEFAULTS = "flaskbus.defaults"
"""Under this name ``ctx.meta`` may hold a function that gives settings which are weaker than flag, environment
and file, and stronger than the built-in defaults."""
