"""The commands of `mt3`, a module each, and what they share."""
