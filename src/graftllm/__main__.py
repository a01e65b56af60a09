"""`python -m graftllm`, which is also what `accelerate launch -m graftllm` starts."""

from graftllm.cli import main

if __name__ == "__main__":
    main()
