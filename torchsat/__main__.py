"""`python -m torchsat`: the command `torchsat`."""

from torchsat.command import main

if __name__ == "__main__":
    raise SystemExit(main())
