"""The bench: methods held against each other on the same users and the same ruler; nothing installed imports it."""
