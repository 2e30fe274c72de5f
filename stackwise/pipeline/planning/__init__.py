"""What a run will take, before it runs: machines, traced memory, measured rates, seconds and what bounds them."""
