"""For those who do not own their training loop: one module per library, each of which imports that library and nothing else does."""
