"""``python -m trtkit.cli``: the ``trtkit`` command without the installed script."""

from trtkit.cli.app import main

if __name__ == "__main__":
    main()
