"""The agent: wraps WSGI apps, takes requests from the bus and pushes the replies."""
