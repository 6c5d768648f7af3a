"""The Triton kernels, one file a family, which live in the repository's top-level ``kernels/``.

setup.py installs that folder as ``peftkern.kernels``, without this file. In a checkout (editable
install, ``PYTHONPATH``, pytest) this file stands in for it and makes ``peftkern.kernels.X`` load
``kernels/X.py``. The folder itself never has an ``__init__.py``: from the repository root it would
then be importable as ``kernels``, and would hide the Hugging Face package of that name, which
transformers probes for at import.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
# Both marks are needed: beside a copy of this package in site-packages, the neighbour named
# `kernels` is Hugging Face's, and its modules must not show up as ours.
if (_checkout / "setup.py").is_file() and not (_checkout / "kernels" / "__init__.py").exists():
    __path__.append(str(_checkout / "kernels"))
