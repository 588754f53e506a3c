"""The suites that moecomm.testing offers: one file for what moves rows, one for what brings tokens to experts."""
