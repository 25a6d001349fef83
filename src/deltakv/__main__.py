"""`python -m deltakv`: the command line."""

from deltakv.cli import main

if __name__ == "__main__":
    main()
