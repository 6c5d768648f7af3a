"""The version of peftkern, which pyproject.toml reads from here."""

__version__ = "0.1.0"

# the release of HF PEFT whose file format and behaviour this version follows
PEFT_COMPAT_VERSION = "0.21.2"
