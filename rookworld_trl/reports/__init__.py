"""Reports of training runs, made from their files alone."""
