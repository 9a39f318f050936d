"""Many WSGI apps behind one port: HTTP requests wait in Redis, and agents pull them."""
