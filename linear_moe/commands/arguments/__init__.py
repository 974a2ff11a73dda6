"""Command lines, a module a command. They import neither torch nor transformers, so that --help answers at once."""
