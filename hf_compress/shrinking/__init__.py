"""One dial: how fast or how small a model shall be; the most accurate one that runs so."""
