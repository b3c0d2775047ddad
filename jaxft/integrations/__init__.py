"""jaxft's potentials inside other packages; each is imported when it is used."""
