"""``python -m`` is the command of the same name, also where scripts are not on PATH."""

from flaskbus.cli import main

if __name__ == "__main__":
    main()
