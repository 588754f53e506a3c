"""moecomm inside other libraries, one file for each. The library is imported when its plug is used."""
