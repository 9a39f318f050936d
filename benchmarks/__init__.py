"""What the bus costs and gains: the same app behind flaskbus and behind what people would use instead.

``python -m benchmarks`` (or ``make bench``) starts each system on this machine, puts the same load on all of them in
turn, checks the answers, and writes a table, JSON and plots. See docs/howto/benchmarks.md.
"""
