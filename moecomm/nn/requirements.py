"""What the layers need beside moecomm's core, looked for before any of them is imported."""

try:
    import torch  # noqa: F401
except ImportError as error:
    # Of the same kind, so that whoever asks for the name of what is missing gets it.
    text = f"moecomm.nn needs torch ({error}): pip install 'moecomm[torch]'"
    raise ModuleNotFoundError(text, name="torch") from error
