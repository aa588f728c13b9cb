"""One file a method. May import layers, targets, backends, io, distributed and algebra."""
