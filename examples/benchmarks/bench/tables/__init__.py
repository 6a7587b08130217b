"""Tables of finished cells: what is in them, how they are laid out, and a picture."""
