"""The Triton kernels, a file for each family, in the repository's top-level folder ``kernels/``.

setup.py installs that folder as ``peftkern.kernels``, without this file. In a checkout (editable
install, ``PYTHONPATH``, pytest) this file makes ``peftkern.kernels.X`` load ``kernels/X.py``. The
folder itself never has an ``__init__.py``: from the repository root it would then be importable as
``kernels``, and would hide the Hugging Face package of that name, for which transformers looks at
import.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
# Both tests are needed: in site-packages the folder `kernels` beside this package is Hugging
# Face's, whose modules must not be importable as ours.
if (_checkout / "setup.py").is_file() and not (_checkout / "kernels" / "__init__.py").exists():
    __path__.append(str(_checkout / "kernels"))
