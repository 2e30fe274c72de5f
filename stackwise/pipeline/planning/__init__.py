"""What a run will do, before it does it: recipes and jobs, room and traffic, windows, why a stage trains."""
