"""What the streaming app sends, for the app and for those who compare."""

CONTENT = b"".join(b"%015d\n" % number for number in range(256 * 1024))
"""4 MiB of counted lines."""

LINE = b"%098d\n"
