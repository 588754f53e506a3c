"""Training of a language model from the command line: python -m moecomm.train --help."""
