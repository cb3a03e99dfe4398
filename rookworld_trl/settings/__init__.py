"""One parser for every program's settings, and what a program shows."""
