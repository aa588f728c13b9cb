"""Meeting other frameworks; one framework a file, found through what it left on a module, never imported."""
