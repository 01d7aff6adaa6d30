"""One interpreter of traced functions: where every parameter is used."""
