"""What server.py stands on: the two servers that it asks, and waitress in front of it."""
