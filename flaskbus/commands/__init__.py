"""The commands of ``flaskbus``, one module each; :mod:`flaskbus.cli` puts them together."""
