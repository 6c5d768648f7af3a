"""What pyproject.toml cannot say: the folder ``kernels/`` is installed as ``peftkern.kernels``."""

from setuptools import find_packages, setup

# Named besides what is found, so that nothing hangs on peftkern/kernels/ (which only a checkout
# needs) being there.
packages = {"peftkern.kernels", *find_packages(include=["peftkern", "peftkern.*"])}

setup(packages=sorted(packages), package_dir={"peftkern.kernels": "kernels"})
