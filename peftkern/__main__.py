"""``python -m peftkern`` is the ``peftkern`` command."""

from .cli.app import main

if __name__ == "__main__":
    main()
